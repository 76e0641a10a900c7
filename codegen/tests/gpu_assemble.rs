//! Every kernel form assembles for every GPU target, without spills, and with `wgmma` in flight side by side.

use moec_abi::DType;
use moec_codegen::{
    Target,
    codes::{Codes, Number},
    gpu::{self, tuned::Choice},
    grouped::{Epilogue, Grouped, RowScale, RowSource},
    mlir::{Keep, Session},
};
use moec_ir::ops::{BinaryFn, UnaryFn};
use std::{path::PathBuf, process::Command};

fn swiglu() -> Epilogue {
    let gate = Epilogue::Unary(UnaryFn::Silu, Box::new(Epilogue::Sum(0)));
    Epilogue::Binary(BinaryFn::Mul, Box::new(gate), Box::new(Epilogue::Sum(1)))
}

fn up(dtype: DType) -> Grouped {
    Grouped {
        symbol: "up".to_owned(),
        experts: 128,
        rows: RowSource::Gathered,
        rows_per_token: 8,
        matrices: 2,
        first: 0,
        given: Vec::new(),
        codes: None,
        k: 2048,
        n: 768,
        a_stride: 2048,
        out_stride: 768,
        a: dtype,
        w: dtype,
        out: dtype,
        bias: false,
        scale: RowScale::None,
        epilogue: swiglu(),
    }
}

fn down(dtype: DType) -> Grouped {
    Grouped {
        symbol: "down".to_owned(),
        rows: RowSource::Sorted,
        matrices: 1,
        k: 768,
        n: 2048,
        a_stride: 768,
        out_stride: 2048,
        scale: RowScale::Output,
        epilogue: Epilogue::Sum(0),
        ..up(dtype)
    }
}

/// `ptxas`, from `MOEC_PTXAS` or the path.
fn ptxas() -> Option<PathBuf> {
    let named = std::env::var_os("MOEC_PTXAS").map(PathBuf::from);
    let path = std::env::var_os("PATH").unwrap_or_default();
    named.or_else(|| std::env::split_paths(&path).map(|p| p.join("ptxas")).find(|p| p.is_file()))
}

#[test]
fn kernels_assemble_without_spills() {
    let session = Session::new();
    for target in [Target::Sm80, Target::Sm89, Target::Sm90a] {
        for spec in [up(DType::Bf16), down(DType::Bf16), up(DType::F32), down(DType::F32)] {
            for variant in gpu::variants(&spec, target) {
                assemble(&session, &spec, &variant, target);
            }
            // The portable kernels too, where others come first.
            let schedule = gpu::schedule(&spec, target, &Choice::without_few(&spec, target));
            assemble(&session, &spec, &gpu::Variant { name: "_any", schedule, tokens: [0, u64::MAX] }, target);
        }
    }
}

#[test]
fn kernels_of_codes_assemble_without_spills() {
    let session = Session::new();
    let fp8 = Codes { bits: 8, number: Number::E4m3, group: 128, zero: false, scale: DType::F32 };
    let mxfp4 = Codes { bits: 4, number: Number::E2m1, group: 32, zero: false, scale: DType::U8 };
    let integer =
        |bits, group| Codes { bits, number: Number::Integer { offset: 0 }, group, zero: true, scale: DType::F32 };
    for codes in [fp8, mxfp4, integer(8, 128), integer(4, 16), integer(2, 64)] {
        for spec in [up(DType::Bf16), down(DType::Bf16)] {
            let spec = Grouped { codes: Some(codes), ..spec };
            let kernels = gpu::variants(&spec, Target::Sm90a);
            assert_eq!(
                kernels.iter().map(|v| v.schedule.kind).collect::<Vec<_>>(),
                [gpu::Kind::Decode, gpu::Kind::Wgmma, gpu::Kind::Wgmma]
            );
            for variant in kernels {
                assemble(&session, &spec, &variant, Target::Sm90a);
            }
        }
    }
}

fn assemble(session: &Session, spec: &Grouped, variant: &gpu::Variant, target: Target) {
    let schedule = &variant.schedule;
    let compiled =
        session.compile(&target, Keep::default(), |b| gpu::emit(b, spec, schedule, target)).expect("compiles");
    let codes = spec
        .codes
        .map_or(String::new(), |c| format!("_{:?}_{}x{}", c.number, c.bits, c.group).replace([' ', '{', '}', ':'], ""));
    let name = format!("{}{}_{:?}{codes}_{:?}_{}", spec.symbol, variant.name, spec.a, schedule.kind, target.name());
    let file = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}.ptx"));
    std::fs::write(&file, &compiled.code).expect("the folder is writable");
    let Some(ptxas) = ptxas() else {
        println!("ptxas not found: {name} not assembled");
        return;
    };
    let output = Command::new(ptxas)
        .args(["-v", "-arch", target.name(), "-o", "/dev/null"])
        .arg(&file)
        .output()
        .expect("ptxas starts");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{name}: {text}");
    println!("{name}: {schedule}, dynamic shared {}: {text}", schedule.shared(spec));
    assert!(text.contains("0 bytes spill stores, 0 bytes spill loads"), "{name}: {text}");
    // Said where products that should overlap would run one after the other.
    assert!(!text.contains("Potential Performance Loss"), "{name}: {text}");
}
