//! Text that is refused, and how it is named.

use moec_sim::{Error, Module};

#[test]
fn an_unknown_instruction_is_an_error_with_its_line() {
    let e = Module::parse(
        ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k()\n{\nfrobnicate.b32 1;\nret;\n}\n",
    );
    assert!(matches!(e, Err(Error::Unsupported { line: 6, .. })), "{e:?}");
}

#[test]
fn a_missing_operand_is_named_with_its_line() {
    let wanted = [
        ("add.s32 %r1, %r2;", "`add.s32`: operand 3 is missing"),
        ("fma.rn.f32 %f1, %f2, %f3;", "operand 4 is missing"),
        ("mov.u32 %r1;", "operand 2 is missing"),
        ("bra;", "operand 1 is missing"),
        ("setp.eq.u32 %p0, %r1;", "operand 3 is missing"),
        ("mbarrier.try_wait.parity.shared::cta.b64 %p0, [%r1];", "operand 3 is missing"),
        (
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd1], %r2;",
            "operand 4 is missing",
        ),
        ("mbarrier.arrive.shared::cta.b64 %rd1;", "operand 2 is missing"),
        ("shfl.sync.bfly.b32 %r1, %r2, 1, 31;", "operand 5 is missing"),
    ];
    for (text, part) in wanted {
        let ptx = format!(
            ".version 8.0\n.target sm_90a\n.entry k()\n{{\n.reg .b32 %r<4>; .reg .f32 %f<4>; .reg .b64 %rd<2>; .reg .pred %p<2>;\n{text}\n}}"
        );
        let said = Module::parse(&ptx).expect_err(text).to_string();
        assert!(said.contains(part) && said.contains('6'), "{text}: {said}");
    }
}

#[test]
fn names_and_operands_may_end_anywhere() {
    // Every instruction of the cases, with its operands and the parts of its name cut off from behind.
    let cases = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/ptx-cases");
    let mut shapes = std::collections::BTreeSet::new();
    let mut cut = 0;
    for file in std::fs::read_dir(cases).into_iter().flatten().flatten() {
        let bytes = std::fs::read(file.path()).unwrap_or_default();
        let Ok((_, header)) = safetensors::SafeTensors::read_metadata(&bytes) else { continue };
        let Some(ptx) = header.metadata().as_ref().and_then(|m| m.get("ptx")) else { continue };
        let Some((head, body)) = ptx.split_once("\n{") else { continue };
        let registers: String = body.lines().filter(|l| l.trim().starts_with(".reg")).collect();
        for line in body.lines().map(str::trim).filter(|l| l.ends_with(';') && !l.starts_with(['.', '@', '$', '{'])) {
            let (name, operands) = line.trim_end_matches(';').split_once(char::is_whitespace).unwrap_or((line, ""));
            if !shapes.insert(name.to_owned()) {
                continue;
            }
            let (parts, list): (Vec<_>, Vec<_>) = (name.split('.').collect(), operands.split(", ").collect());
            for (n, k) in (0..=list.len()).map(|k| (parts.len(), k)).chain((1..parts.len()).map(|n| (n, list.len()))) {
                let text = format!("{head}\n{{{registers} {} {};\n}}", parts[..n].join("."), list[..k].join(", "));
                cut += usize::from(Module::parse(&text).is_err());
            }
        }
    }
    assert!(shapes.len() > 250 && cut > 1000, "{} instructions, {cut} refused", shapes.len());
}

#[test]
fn hostile_text_is_refused_and_does_not_crash() {
    for text in [
        "",
        ".entry",
        ".visible .entry k(",
        "{{{{",
        ".global .b8 x[99999999999999999999];",
        ".entry k() { mov.b32 {a, b}, [",
        ".entry k() { @ }",
        "\"",
        "/*",
        ".func f() { call f, (1,2); }",
    ] {
        let _ = Module::parse(text);
    }
    let deep = format!(".entry k() {{ mov.b32 {}1; }}", "{".repeat(100_000));
    assert!(Module::parse(&deep).is_err());
}
