//! Case files: PTX with its inputs and the results something independent gives.
//!
//! A case is one `.safetensors` file with the metadata of `moec-ptx-case-1`; `tests/ptx-cases/README.md` describes it.
//! A correct case passes when its outputs agree and nothing is found; a faulty one when a finding of its kind names
//! the kernel and one of its lines.

#![allow(clippy::wildcard_enum_match_arm, reason = "types that the format does not have are refused")]

use crate::{
    Arg, Error, FindingKind, Launch, MapType, Memory, Module, Options, Report, Swizzle, TensorMapDesc, launch,
};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use std::collections::BTreeMap;

/// How a case went.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Outcome {
    /// Name of the case.
    pub case: String,
    /// What it expects: `ok` or the kind of a finding.
    pub expect: String,
    /// Why it failed; nothing when it passed.
    pub failure: Option<String>,
    /// What the simulator reported.
    pub report: Report,
}

impl Outcome {
    /// Whether the case passed.
    #[must_use]
    pub fn passed(&self) -> bool {
        self.failure.is_none()
    }
}

/// Something else that runs PTX: a driver with its device. Errors are texts for people.
pub trait Machine {
    /// `bytes` of memory at a multiple of `align`, content undefined.
    ///
    /// # Errors
    /// There is no memory.
    fn alloc(&mut self, bytes: u64, align: u64) -> Result<u64, String>;

    /// Copies to the machine's memory.
    ///
    /// # Errors
    /// The copy fails.
    fn write(&mut self, address: u64, data: &[u8]) -> Result<(), String>;

    /// Copies from the machine's memory, after the launch.
    ///
    /// # Errors
    /// The copy fails.
    fn read(&mut self, address: u64, bytes: u64) -> Result<Vec<u8>, String>;

    /// Loads the module and runs one kernel of it to its end.
    ///
    /// # Errors
    /// The module or the launch is refused, or the kernel fails.
    fn launch(&mut self, ptx: &str, launch: &Launch<'_>) -> Result<(), String>;
}

/// How far an output may be from its expectation.
#[derive(Clone, Copy, Debug, Default)]
struct Tolerance {
    max_abs: f64,
    max_rel: f64,
}

/// A case, read and parsed.
#[derive(Debug)]
pub struct Case {
    name: String,
    target: String,
    ptx: String,
    module: Module,
    entry: String,
    grid: [u32; 3],
    block: [u32; 3],
    cluster: [u32; 3],
    dynamic_shared: u32,
    args: Vec<Value>,
    buffers: BTreeMap<String, (u64, u64)>,
    inputs: BTreeMap<String, Vec<u8>>,
    expected: BTreeMap<String, (Dtype, Vec<u8>)>,
    outputs: Vec<String>,
    tolerance: BTreeMap<String, Tolerance>,
    expect: String,
    fault_lines: Vec<u32>,
}

fn bad<T>(message: impl Into<String>) -> Result<T, Error> {
    Err(Error::Case(message.into()))
}

fn json(meta: &BTreeMap<String, String>, key: &str) -> Result<Value, Error> {
    match meta.get(key) {
        Some(text) => serde_json::from_str(text).or_else(|e| bad(format!("`{key}` is not JSON: {e}"))),
        None => bad(format!("no `{key}`")),
    }
}

fn triple(text: &str) -> Result<[u32; 3], Error> {
    let v: Vec<u32> = text
        .split(',')
        .map(|x| x.trim().parse::<u32>())
        .collect::<Result<_, _>>()
        .or_else(|e| bad(format!("`{text}`: {e}")))?;
    match v[..] {
        [x, y, z] => Ok([x, y, z]),
        _ => bad(format!("`{text}` is not `x,y,z`")),
    }
}

fn number(v: &Value, what: &str) -> Result<u64, Error> {
    match v.as_u64().or_else(|| v.as_i64().map(|i| i as u64)) {
        Some(n) => Ok(n),
        None => bad(format!("{what} is not a number: {v}")),
    }
}

fn numbers(v: &Value, what: &str) -> Result<Vec<u64>, Error> {
    match v.as_array() {
        Some(a) => a.iter().map(|x| number(x, what)).collect(),
        None => bad(format!("{what} is not a list: {v}")),
    }
}

impl Case {
    /// Reads a case from the bytes of its file.
    ///
    /// # Errors
    ///
    /// [`Error::Case`] when the file does not follow the format, and the errors of [`Module::parse`].
    pub fn read(file: &[u8]) -> Result<Case, Error> {
        let (_, header) = SafeTensors::read_metadata(file).or_else(|e| bad(format!("not a safetensors file: {e}")))?;
        let meta: BTreeMap<String, String> = header
            .metadata()
            .as_ref()
            .map(|m| m.iter().map(|(k, v)| (k.clone(), v.clone())).collect())
            .unwrap_or_default();
        let tensors = SafeTensors::deserialize(file).or_else(|e| bad(format!("not a safetensors file: {e}")))?;
        let text = |key: &str| match meta.get(key) {
            Some(t) => Ok(t.as_str()),
            None => bad(format!("no `{key}`")),
        };
        if text("format")? != "moec-ptx-case-1" {
            return bad(format!("format `{}` is not known", text("format")?));
        }
        let (mut inputs, mut expected) = (BTreeMap::new(), BTreeMap::new());
        for (name, view) in tensors.tensors() {
            if let Some(n) = name.strip_prefix("inputs.") {
                inputs.insert(n.to_owned(), view.data().to_vec());
            } else if let Some(n) = name.strip_prefix("expected.") {
                expected.insert(n.to_owned(), (view.dtype(), view.data().to_vec()));
            } else {
                return bad(format!("tensor `{name}` is neither input nor expectation"));
            }
        }
        let mut buffers = BTreeMap::new();
        for (name, b) in json(&meta, "buffers")?.as_object().into_iter().flatten() {
            buffers.insert(name.clone(), (number(&b["bytes"], "bytes")?, number(&b["align"], "align")?));
        }
        let mut tolerance = BTreeMap::new();
        for (name, t) in json(&meta, "tolerance")?.as_object().into_iter().flatten() {
            tolerance.insert(
                name.clone(),
                Tolerance {
                    max_abs: t["max_abs"].as_f64().unwrap_or(0.0),
                    max_rel: t["max_rel"].as_f64().unwrap_or(0.0),
                },
            );
        }
        let outputs = json(&meta, "outputs")?
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|v| v.as_str().map(str::to_owned))
            .collect();
        let fault_lines = if meta.contains_key("fault_lines") {
            numbers(&json(&meta, "fault_lines")?, "fault_lines")?.iter().map(|n| *n as u32).collect()
        } else {
            Vec::new()
        };
        Ok(Case {
            name: text("case")?.to_owned(),
            target: text("target")?.to_owned(),
            ptx: text("ptx")?.to_owned(),
            module: Module::parse(text("ptx")?)?,
            entry: text("entry")?.to_owned(),
            grid: triple(text("grid")?)?,
            block: triple(text("block")?)?,
            cluster: meta.get("cluster").map_or(Ok([1; 3]), |c| triple(c))?,
            dynamic_shared: text("dynamic_shared")?.parse().or_else(|e| bad(format!("dynamic_shared: {e}")))?,
            args: json(&meta, "args")?.as_array().cloned().unwrap_or_default(),
            buffers,
            inputs,
            expected,
            outputs,
            tolerance,
            expect: text("expect")?.to_owned(),
            fault_lines,
        })
    }

    /// Name of the case.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Target of the code, such as `sm_90a`.
    #[must_use]
    pub fn target(&self) -> &str {
        &self.target
    }

    /// Whether the kernel is correct, so that its results count.
    #[must_use]
    pub fn is_correct(&self) -> bool {
        self.expect == "ok"
    }

    /// Runs the case on the simulator and judges it.
    ///
    /// # Errors
    ///
    /// [`Error::Case`] for arguments that do not follow the format, and the errors of [`launch()`].
    pub fn run(&self, options: &Options) -> Result<Outcome, Error> {
        let mut memory = Memory::new();
        let mut address = BTreeMap::new();
        for (name, (bytes, align)) in &self.buffers {
            let a = memory.alloc(*bytes, *align);
            if let Some(data) = self.input(name, *bytes)? {
                memory.write(a, data)?;
            }
            address.insert(name.as_str(), a);
        }
        let report = launch(&self.module, &mut memory, &self.launch(&address)?, options)?;
        let failure = if !self.is_correct() {
            self.judge_faulty(&report)
        } else if let Some(f) = report.findings.first() {
            Some(format!("{} findings, first: {f}", report.findings.len()))
        } else {
            self.judge_results(|name, bytes| memory.read(address[name], bytes))?
        };
        Ok(Outcome { case: self.name.clone(), expect: self.expect.clone(), failure, report })
    }

    /// Runs a correct case on another machine and compares its results; says why it failed.
    ///
    /// # Errors
    ///
    /// [`Error::Case`] for arguments that do not follow the format.
    pub fn run_on(&self, machine: &mut dyn Machine) -> Result<Option<String>, Error> {
        let mut address = BTreeMap::new();
        for (name, (bytes, align)) in &self.buffers {
            let a = match machine.alloc(*bytes, *align) {
                Ok(a) => a,
                Err(why) => return Ok(Some(why)),
            };
            // Memory that nothing has written shall not look like zeros.
            let poison = vec![0xff; *bytes as usize];
            if let Err(why) = machine.write(a, self.input(name, *bytes)?.unwrap_or(&poison)) {
                return Ok(Some(why));
            }
            address.insert(name.as_str(), a);
        }
        if let Err(why) = machine.launch(&self.ptx, &self.launch(&address)?) {
            return Ok(Some(why));
        }
        self.judge_results(|name, bytes| machine.read(address[name], bytes).map_err(Error::Case))
    }

    fn input(&self, name: &str, bytes: u64) -> Result<Option<&[u8]>, Error> {
        let Some(data) = self.inputs.get(name) else { return Ok(None) };
        if data.len() as u64 != bytes {
            return bad(format!("inputs.{name} has {} bytes, the buffer {bytes}", data.len()));
        }
        Ok(Some(data))
    }

    fn launch(&self, address: &BTreeMap<&str, u64>) -> Result<Launch<'_>, Error> {
        Ok(Launch {
            entry: &self.entry,
            grid: self.grid,
            block: self.block,
            cluster: self.cluster,
            dynamic_shared: self.dynamic_shared,
            dependent: false,
            args: self.args.iter().map(|a| argument(a, address)).collect::<Result<_, _>>()?,
        })
    }

    fn judge_faulty(&self, report: &Report) -> Option<String> {
        let hit = report
            .findings
            .iter()
            .any(|f| f.kind.name() == self.expect && f.kernel == self.entry && self.fault_lines.contains(&f.line));
        if hit {
            return None;
        }
        let seen: Vec<String> = report.findings.iter().map(ToString::to_string).collect();
        Some(format!("no `{}` at one of the lines {:?}; found: [{}]", self.expect, self.fault_lines, seen.join("; ")))
    }

    fn judge_results(
        &self,
        mut read: impl FnMut(&str, u64) -> Result<Vec<u8>, Error>,
    ) -> Result<Option<String>, Error> {
        for name in &self.outputs {
            let (Some((bytes, _)), Some((dtype, want))) = (self.buffers.get(name), self.expected.get(name)) else {
                return bad(format!("output `{name}` has no buffer or no expectation"));
            };
            let got = read(name, *bytes)?;
            if got.len() != want.len() {
                return bad(format!("expected.{name} has {} bytes, the buffer {bytes}", want.len()));
            }
            let t = self.tolerance.get(name).copied().unwrap_or_default();
            if let Some(m) = compare(*dtype, &got, want, t)? {
                return Ok(Some(format!("output `{name}`: {m}")));
            }
        }
        Ok(None)
    }
}

fn argument(a: &Value, address: &BTreeMap<&str, u64>) -> Result<Arg, Error> {
    let Some((kind, v)) = a.as_object().and_then(|o| o.iter().next()) else { return bad(format!("argument {a}")) };
    let buffer = |v: &Value| match v.as_str().and_then(|n| address.get(n)) {
        Some(x) => Ok(*x),
        None => bad(format!("no buffer {v}")),
    };
    Ok(match kind.as_str() {
        "buffer" => Arg::U64(buffer(v)?),
        "null" => Arg::U64(0),
        "i32" => Arg::U32(number(v, "i32")? as u32),
        "i64" => Arg::U64(number(v, "i64")?),
        "f32" => match v.as_f64() {
            Some(x) => Arg::F32(x as f32),
            None => return bad(format!("argument {a}")),
        },
        "tensormap" => {
            let dtype = v["dtype"].as_str().unwrap_or("");
            let swizzle = v["swizzle"].as_str().unwrap_or("");
            let (Some(dtype), Some(swizzle)) = (MapType::parse(dtype), Swizzle::parse(swizzle)) else {
                return bad(format!("tensor map {v}"));
            };
            Arg::TensorMap(TensorMapDesc {
                dtype,
                base: buffer(&v["buffer"])?,
                dims: numbers(&v["dims"], "dims")?,
                strides: numbers(&v["strides"], "strides")?,
                box_dims: numbers(&v["box"], "box")?.iter().map(|b| *b as u32).collect(),
                element_strides: Vec::new(),
                swizzle,
            })
        }
        _ => return bad(format!("argument of kind `{kind}`")),
    })
}

/// The first difference beyond the tolerance.
fn compare(dtype: Dtype, got: &[u8], want: &[u8], t: Tolerance) -> Result<Option<String>, Error> {
    let Some((size, float)) = element(dtype) else { return bad(format!("outputs of type {dtype:?}")) };
    for (i, (g, w)) in got.chunks_exact(size).zip(want.chunks_exact(size)).enumerate() {
        if g == w {
            continue;
        }
        let Some(read) = float else { return Ok(Some(format!("element {i} is {g:02x?}, expected {w:02x?}"))) };
        let (a, b) = (read(g), read(w));
        let same = a == b || (a.is_nan() && b.is_nan());
        let near = (a - b).abs() <= t.max_abs + t.max_rel * b.abs();
        if !same && !near {
            return Ok(Some(format!("element {i} is {a}, expected {b}")));
        }
    }
    Ok(None)
}

type ReadFloat = fn(&[u8]) -> f64;

fn element(d: Dtype) -> Option<(usize, Option<ReadFloat>)> {
    fn word(b: &[u8]) -> u64 {
        b.iter().rev().fold(0, |x, y| x << 8 | u64::from(*y))
    }
    Some(match d {
        Dtype::BOOL | Dtype::U8 | Dtype::I8 => (1, None),
        Dtype::U16 | Dtype::I16 => (2, None),
        Dtype::U32 | Dtype::I32 => (4, None),
        Dtype::U64 | Dtype::I64 => (8, None),
        Dtype::F32 => (4, Some(|b| f64::from(f32::from_bits(word(b) as u32)))),
        Dtype::F64 => (8, Some(|b| f64::from_bits(word(b)))),
        Dtype::F16 => (2, Some(|b| f64::from(half::f16::from_bits(word(b) as u16)))),
        Dtype::BF16 => (2, Some(|b| f64::from(half::bf16::from_bits(word(b) as u16)))),
        Dtype::F8_E4M3 => (1, Some(|b| crate::num::decode(u32::from(b[0]), crate::num::E4M3))),
        Dtype::F8_E5M2 => (1, Some(|b| crate::num::decode(u32::from(b[0]), crate::num::E5M2))),
        _ => return None,
    })
}

/// Reads and runs a case file with one seed.
///
/// # Errors
///
/// As [`Case::read`] and [`Case::run`].
pub fn run(file: &[u8], seed: u64) -> Result<Outcome, Error> {
    Case::read(file)?.run(&Options { seed, ..Options::default() })
}

/// Whether a name is the kind of a finding, for tools that check case files.
#[must_use]
pub fn is_finding(name: &str) -> bool {
    use FindingKind as K;
    [
        K::OutOfBounds,
        K::Misaligned,
        K::Uninitialized,
        K::Race,
        K::MissingWait,
        K::MissingFence,
        K::BarrierDivergence,
        K::Deadlock,
        K::Mbarrier,
        K::TensorMap,
        K::Misuse,
        K::Trap,
    ]
    .iter()
    .any(|k| k.name() == name)
}
