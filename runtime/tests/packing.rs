//! Packing against a reference that follows the definition of each layout, one element at a time.

use half::{bf16, f16};
use moec_abi::{DType, Layout, Matrix, Packing, Slot, Source, View};
use moec_runtime::{InMemory, Random, TensorView, Tensors, materialize, pack};
use proptest::prelude::*;

fn source(tensor: &str, view: Vec<View>, dtype: DType) -> Source {
    Source { tensor: tensor.into(), packing: Packing::Plain, view, dtype }
}

fn slot(matrices: Vec<Matrix>, experts: u64, layout: Layout, dtype: DType) -> Slot {
    let mut slot = Slot {
        name: "s".into(),
        experts,
        first_expert: 2,
        numbers: Vec::new(),
        matrices,
        layout,
        dtype,
        bytes: 0,
        offsets: Vec::new(),
    };
    slot.place(64).unwrap();
    slot
}

/// Position of an element in its expert, as the documentation of [`Layout`] says.
fn position(layout: &Layout, n: u64, rows: u64, columns: u64, m: u64, r: u64, c: u64) -> u64 {
    let up = |v: u64, unit: u64| v.div_ceil(unit) * unit;
    match *layout {
        Layout::Rows { columns: unit } => (m * rows + r) * up(columns, unit) + c,
        Layout::Panels { panel, depth, columns: unit } => {
            let groups = up(up(columns, unit), depth) / depth;
            ((((r / panel) * n + m) * groups + c / depth) * panel + r % panel) * depth + c % depth
        }
        Layout::Interleaved { block, columns: unit } => {
            (((r / block) * n + m) * block + r % block) * up(columns, unit) + c
        }
        Layout::Fragments { lanes, unit, columns: whole } => {
            let depth = 8 * lanes * unit;
            let groups = up(up(columns, whole), depth) / depth;
            let row = (((r / 8) * n + m) * groups + c / depth) * 8 + r % 8;
            let (lane, piece) = (c / unit % lanes, c / unit / lanes % 8);
            ((row * lanes + lane) * 8 + piece) * unit + c % unit
        }
    }
}

fn bytes_of(dtype: DType, value: f32) -> Vec<u8> {
    match dtype {
        DType::F32 => value.to_le_bytes().to_vec(),
        DType::Bf16 => bf16::from_f32(value).to_le_bytes().to_vec(),
        DType::F16 => f16::from_f32(value).to_le_bytes().to_vec(),
        DType::F64 => f64::from(value).to_le_bytes().to_vec(),
        DType::I32 => (value as i32).to_le_bytes().to_vec(),
        DType::I64 => (value as i64).to_le_bytes().to_vec(),
        DType::U8 => vec![value as u8],
        DType::I8 => vec![(value as i8).cast_unsigned()],
        DType::F8e4m3 | DType::F8e5m2 => panic!("not stored by these tests"),
    }
}

fn reference(slot: &Slot, prefix: &str, tensors: &dyn Tensors) -> Vec<u8> {
    let size = slot.dtype.bytes();
    let mut out = vec![0; slot.bytes as usize];
    for e in 0..slot.experts {
        let (rows, columns) = slot.size_of(e).unwrap();
        for (m, matrix) in slot.matrices.iter().enumerate() {
            let values = materialize(&matrix.source, rows, columns, slot.first_expert + e, prefix, tensors).unwrap();
            for r in 0..rows {
                for c in 0..columns {
                    let p = position(&slot.layout, slot.matrices.len() as u64, rows, columns, m as u64, r, c);
                    let at = (slot.offsets[e as usize] + p * size) as usize;
                    let bytes = bytes_of(slot.dtype, values[(r * columns + c) as usize]);
                    out[at..at + size as usize].copy_from_slice(&bytes);
                }
            }
        }
    }
    out
}

fn tensor(dtype: DType, shape: &[u64], value: impl Fn(u64) -> f32) -> (DType, Vec<u64>, Vec<u8>) {
    let bytes = (0..shape.iter().product()).flat_map(|i| bytes_of(dtype, value(i))).collect();
    (dtype, shape.to_vec(), bytes)
}

fn check(slot: &Slot, tensors: &dyn Tensors) {
    let mut out = vec![0xaa; slot.bytes as usize];
    pack(slot, "p.", tensors, &mut out).unwrap();
    assert!(out == reference(slot, "p.", tensors), "{slot:?}");
}

fn layouts() -> impl Strategy<Value = Layout> {
    prop_oneof![
        (1u64..9).prop_map(|columns| Layout::Rows { columns }),
        (1u64..20, prop::sample::select(vec![1u64, 2, 3, 4, 8]), 1u64..9)
            .prop_map(|(panel, depth, columns)| Layout::Panels { panel, depth, columns }),
        (1u64..20, 1u64..9).prop_map(|(block, columns)| Layout::Interleaved { block, columns }),
        (1u64..6, 1u64..4, 1u64..70).prop_map(|(lanes, unit, columns)| Layout::Fragments { lanes, unit, columns }),
    ]
}

const STORED: [DType; 4] = [DType::F32, DType::Bf16, DType::F16, DType::I8];
const PACKED: [DType; 6] = [DType::F32, DType::Bf16, DType::F16, DType::F64, DType::I32, DType::U8];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn every_layout_packs_as_its_definition_says(
        layout in layouts(),
        stored in prop::sample::select(STORED.to_vec()),
        packed in prop::sample::select(PACKED.to_vec()),
        rows in prop::collection::vec(0u64..40, 3),
        columns in 0u64..150,
        ragged in any::<bool>(),
        matrices in 1usize..4,
    ) {
        let mut tensors = InMemory::new();
        let rows = if ragged { rows } else { vec![rows[0]] };
        for e in 0..3 {
            for m in 0..matrices {
                let r = rows[e as usize % rows.len()];
                let (d, s, b) = tensor(stored, &[r, columns], |i| ((i * 7 + m as u64 * 31 + e * 5) % 100) as f32);
                tensors.insert(format!("p.{}.{m}", e + 2), d, s, b).unwrap();
            }
        }
        let matrices = (0..matrices)
            .map(|m| Matrix {
                source: source(&format!("{{p}}{{e}}.{m}"), vec![], stored),
                rows: rows.clone(),
                columns: vec![columns],
            })
            .collect();
        check(&slot(matrices, 3, layout, packed), &tensors);
    }

    #[test]
    fn stacked_transposed_and_interleaved_tensors_are_viewed_rightly(
        layout in layouts(), rows in 1u64..20, columns in 1u64..90, transpose in any::<bool>(), halves in any::<bool>(),
    ) {
        // Gate and up in one tensor, as halves or row by row, of 5 experts of which 3 are packed.
        let shape = if transpose { vec![5, columns, 2 * rows] } else { vec![5, 2 * rows, columns] };
        let (d, s, b) = tensor(DType::Bf16, &shape, |i| (i % 251) as f32);
        let mut tensors = InMemory::new();
        tensors.insert("p.gate_up", d, s, b).unwrap();
        let part = |m: u64| {
            let mut view = vec![View::Expert];
            if transpose {
                view.push(View::Transpose);
            }
            let (start, step) = if halves { (m * rows, 1) } else { (m, 2) };
            view.push(View::Slice { axis: 0, start, len: rows, step });
            Matrix { source: source("{p}gate_up", view, DType::Bf16), rows: vec![rows], columns: vec![columns] }
        };
        let slot = slot(vec![part(0), part(1)], 3, layout, DType::Bf16);
        check(&slot, &tensors);
        // And the reference itself, for one element.
        let values = materialize(&slot.matrices[1].source, rows, columns, 3, "p.", &tensors).unwrap();
        let row = if halves { rows } else { 1 };
        let at = if transpose { 3 * columns * 2 * rows + row } else { (3 * 2 * rows + row) * columns };
        prop_assert_eq!(values[0], (at % 251) as f32);
    }
}

#[test]
fn rows_of_stacked_experts_and_reshapes_give_the_right_elements() {
    let mut tensors = InMemory::new();
    let (d, s, b) = tensor(DType::F32, &[4 * 3, 5], |i| i as f32);
    tensors.insert("w", d, s, b).unwrap();
    let rows = materialize(&source("w", vec![View::ExpertRows { rows: 3 }], DType::F32), 3, 5, 2, "", &tensors);
    assert_eq!(rows.unwrap(), (30..45).map(|i| i as f32).collect::<Vec<_>>());
    // A reshape that needs a copy: columns 0..2 of all rows, transposed, as one row after the other.
    let view = vec![
        View::Slice { axis: 1, start: 0, len: 2, step: 1 },
        View::Transpose,
        View::Reshape { shape: vec![8, 3] },
        View::Slice { axis: 0, start: 1, len: 2, step: 4 },
    ];
    let values = materialize(&source("w", view, DType::F32), 2, 3, 0, "", &tensors).unwrap();
    let flat: Vec<f32> = (0..2).flat_map(|c| (0..12).map(move |r| (r * 5 + c) as f32)).collect();
    assert_eq!(values, [&flat[3..6], &flat[15..18]].concat());
}

#[test]
fn fp8_tiles_at_the_border_use_their_own_factor() {
    let mut tensors = InMemory::new();
    let (rows, columns) = (5u64, 7u64);
    // Code 0x38 is 1.0, 0x40 is 2.0.
    let codes = (0..2 * rows * columns).map(|i| if i % 2 == 0 { 0x38 } else { 0x40 }).collect();
    tensors.insert("w", DType::F8e4m3, vec![2, rows, columns], codes).unwrap();
    let (d, s, b) = tensor(DType::F32, &[2, 2, 3], |i| (i + 1) as f32);
    tensors.insert("w.scale", d, s, b).unwrap();
    let packing = Packing::Fp8Block { scale: "w.scale".into(), block: [4, 3] };
    for view in [vec![View::Expert], vec![View::Expert, View::Transpose]] {
        let transposed = view.len() == 2;
        let source = Source { tensor: "w".into(), packing: packing.clone(), view, dtype: DType::Bf16 };
        let (a, b) = if transposed { (columns, rows) } else { (rows, columns) };
        let values = materialize(&source, a, b, 1, "", &tensors).unwrap();
        for r in 0..rows {
            for c in 0..columns {
                let code = if (rows * columns + r * columns + c) % 2 == 0 { 1.0 } else { 2.0 };
                let factor = (6 + (r / 4) * 3 + c / 3 + 1) as f32;
                let at = if transposed { c * rows + r } else { r * columns + c };
                assert_eq!(values[at as usize], code * factor, "{r} {c}");
            }
        }
        let matrix = Matrix { source, rows: vec![a], columns: vec![b] };
        let mut slot = slot(vec![matrix], 1, Layout::Panels { panel: 4, depth: 2, columns: 4 }, DType::Bf16);
        slot.first_expert = 1;
        check(&slot, &tensors);
    }
}

#[test]
fn mxfp4_takes_the_low_nibble_first_and_scales_by_blocks() {
    let mut tensors = InMemory::new();
    let codes: Vec<u8> = (0..2 * 3 * 2 * 16).map(|i| (i * 37 % 256) as u8).collect();
    tensors.insert("b", DType::U8, vec![2, 3, 2, 16], codes.clone()).unwrap();
    let scales: Vec<u8> = (0..12).map(|i| 120 + i).collect();
    tensors.insert("s", DType::U8, vec![2, 3, 2], scales.clone()).unwrap();
    let source = Source {
        tensor: "b".into(),
        packing: Packing::Mxfp4 { scales: "s".into() },
        view: vec![View::Expert],
        dtype: DType::F32,
    };
    let values = materialize(&source, 3, 64, 1, "", &tensors).unwrap();
    let magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    for (i, value) in values.iter().enumerate() {
        let byte = codes[96 + i / 2];
        let code = if i % 2 == 0 { byte & 15 } else { byte >> 4 };
        let sign = if code & 8 == 0 { 1.0 } else { -1.0 };
        let scale = 2f32.powi(i32::from(scales[6 + i / 32]) - 127);
        assert_eq!(*value, sign * magnitudes[usize::from(code & 7)] * scale);
    }
}

#[test]
fn nan_and_its_payload_survive_the_direct_way() {
    let mut tensors = InMemory::new();
    let bits: Vec<u16> = (0..64).map(|i| if i % 3 == 0 { 0x7f81 + i } else { i }).collect();
    tensors.insert("w", DType::Bf16, vec![8, 8], bits.iter().flat_map(|b| b.to_le_bytes()).collect()).unwrap();
    let matrix = Matrix { source: source("w", vec![], DType::Bf16), rows: vec![8], columns: vec![8] };
    let slot = slot(vec![matrix], 1, Layout::Panels { panel: 4, depth: 2, columns: 2 }, DType::Bf16);
    let mut out = vec![0; slot.bytes as usize];
    pack(&slot, "", &tensors, &mut out).unwrap();
    for r in 0..8 {
        for c in 0..8 {
            let at = position(&slot.layout, 1, 8, 8, 0, r, c) as usize * 2;
            assert_eq!([out[at], out[at + 1]], bits[(r * 8 + c) as usize].to_le_bytes());
        }
    }
}

#[test]
fn large_integers_stay_exact() {
    let mut tensors = InMemory::new();
    let value = (1i64 << 40) + 1;
    tensors.insert("ids", DType::I64, vec![1], value.to_le_bytes().to_vec()).unwrap();
    let matrix = Matrix { source: source("ids", vec![], DType::I64), rows: vec![1], columns: vec![1] };
    let slot = slot(vec![matrix], 1, Layout::Rows { columns: 1 }, DType::I64);
    let mut out = vec![0; slot.bytes as usize];
    pack(&slot, "", &tensors, &mut out).unwrap();
    assert_eq!(out[..8], value.to_le_bytes());
}

#[test]
fn missing_and_misfitting_tensors_are_named() {
    let mut tensors = InMemory::new();
    let (d, s, b) = tensor(DType::F32, &[3, 4], |_| 0.0);
    tensors.insert("p.w", d, s, b).unwrap();
    let missing = materialize(&source("{p}v", vec![], DType::F32), 3, 4, 0, "p.", &tensors).unwrap_err();
    assert_eq!(missing.to_string(), "no tensor named p.v");
    let transposed = materialize(&source("{p}w", vec![], DType::F32), 4, 3, 0, "p.", &tensors).unwrap_err();
    assert_eq!(transposed.to_string(), "tensor p.w of shape [3, 4] does not give 4 x 3");
    let few = materialize(&source("{p}w", vec![View::Index { index: 3 }], DType::F32), 4, 1, 0, "p.", &tensors);
    assert_eq!(few.unwrap_err().to_string(), "tensor p.w of shape [3, 4] is too small; wanted 4 x 1");
}

#[test]
fn random_weights_do_not_depend_on_the_order_of_reading() {
    let half = |start| {
        let view = vec![View::Expert, View::Slice { axis: 0, start, len: 6, step: 2 }, View::Transpose];
        Matrix { source: source("{p}gate_up", view, DType::Bf16), rows: vec![10], columns: vec![6] }
    };
    let bias = source("{p}bias", vec![View::Expert], DType::F32);
    let bias = Matrix { source: bias, rows: vec![10], columns: vec![1] };
    let slots = [
        slot(vec![half(0), half(1)], 3, Layout::Rows { columns: 1 }, DType::F32),
        slot(vec![bias], 3, Layout::Rows { columns: 1 }, DType::F32),
    ];
    let random = Random::new(&slots, "l.", 7).unwrap();
    let TensorView { dtype, shape, .. } = random.find("l.gate_up").unwrap();
    assert_eq!((dtype, shape), (DType::Bf16, vec![5, 12, 10]));
    assert_eq!(random.find("l.bias").unwrap().shape, [5, 10]);
    let all = random.find("l.gate_up").unwrap().read(0, 1200).unwrap().into_vec();
    for start in [2u64, 4, 30, 598] {
        assert_eq!(*random.find("l.gate_up").unwrap().read(start, start + 2).unwrap(), all[start as usize..][..2]);
    }
    let values = materialize(&slots[0].matrices[0].source, 10, 6, 2, "l.", &random).unwrap();
    assert!(values.iter().all(|v| v.abs() <= 0.0501) && values.iter().any(|v| *v > 0.0));
    let other = Random::new(&slots, "l.", 8).unwrap();
    assert_ne!(*other.find("l.gate_up").unwrap().read(0, 1200).unwrap(), all[..]);
    check(&slots[0], &Random::new(&slots, "p.", 7).unwrap());
}

#[test]
fn packed_formats_have_random_forms_too() {
    let fp8 = Source {
        tensor: "{p}{e}.w".into(),
        packing: Packing::Fp8Block { scale: "{p}{e}.s".into(), block: [8, 8] },
        view: vec![],
        dtype: DType::Bf16,
    };
    let mx = Source {
        tensor: "{p}b".into(),
        packing: Packing::Mxfp4 { scales: "{p}s".into() },
        view: vec![View::Expert],
        dtype: DType::Bf16,
    };
    for source in [fp8, mx] {
        let matrix = Matrix { source, rows: vec![12], columns: vec![64] };
        let slots = [slot(vec![matrix], 2, Layout::Rows { columns: 1 }, DType::Bf16)];
        let random = Random::new(&slots, "p.", 1).unwrap();
        check(&slots[0], &random);
        let values = materialize(&slots[0].matrices[0].source, 12, 64, 3, "p.", &random).unwrap();
        assert!(values.iter().all(|v| v.abs() <= 0.0502) && values.iter().any(|v| *v > 0.01));
    }
}
