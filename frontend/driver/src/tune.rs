//! Measuring which schedules suit a device: one number of one product is changed at a time, and kept if it is faster.
//!
//! The search is a function of what was measured: started again with a record, it finds in it what it asked before and
//! goes on where it stopped.

use crate::Error;
use moec_codegen::{
    Target,
    gpu::tuned::{Choice, Table},
    lower::TunedProduct,
};
use serde::{Deserialize, Serialize};

/// What must be gained for a change to be kept: less is noise.
const GAIN: f64 = 0.01;

/// What was measured on a device, and what follows from it. This is the file that `compile --tuned` reads.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// Version of the form.
    pub schema: u32,
    /// The device, such as `cuda` or `sim`.
    pub device: String,
    /// Tokens of the launches that were measured.
    pub tokens: Vec<u64>,
    /// Whether no change of one number is faster than what was chosen.
    pub complete: bool,
    /// What was chosen.
    pub products: Table,
    /// Everything that was measured.
    pub tried: Vec<Tried>,
}

/// One measurement.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tried {
    /// Products that were compiled with other numbers than usual.
    pub products: Table,
    /// Time of a layer for each number of tokens, microseconds; `None` where a launch failed or could not be compiled.
    pub microseconds: Option<Vec<f64>>,
}

impl Record {
    /// A record of nothing.
    pub fn new(device: &str, tokens: &[u64]) -> Self {
        Self {
            schema: 1,
            device: device.to_owned(),
            tokens: tokens.to_vec(),
            complete: false,
            products: Table::default(),
            tried: Vec::new(),
        }
    }

    /// Reads a file.
    ///
    /// # Errors
    /// `E0404` for text that is no record.
    pub fn from_json(text: &str) -> Result<Self, Error> {
        let wrong = |why: String| {
            Error::refused("E0404", format!("the tuned table cannot be read: {why}"), "`moec bench --tune` writes one")
        };
        let record: Self = serde_json::from_str(text).map_err(|e| wrong(e.to_string()))?;
        if record.schema == 1 { Ok(record) } else { Err(wrong(format!("schema {} is not 1", record.schema))) }
    }

    fn known(&self, products: &Table) -> Option<&Tried> {
        self.tried.iter().find(|t| t.products == *products)
    }
}

/// What a search stopped for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Nothing that differs in one number is faster.
    Best,
    /// Time was over.
    Budget,
}

/// Where measurements come from and go to.
pub trait Bench {
    /// The products of the layer, with what they are compiled with.
    ///
    /// # Errors
    /// The layer cannot be compiled.
    fn products(&mut self, table: &Table) -> Result<Vec<TunedProduct>, Error>;

    /// Compiles with a table and measures: microseconds for each number of tokens.
    ///
    /// # Errors
    /// A launch fails, or the layer cannot be compiled.
    fn measure(&mut self, table: &Table) -> Result<Vec<f64>, Error>;

    /// A measurement was made; keeps the record. Gives whether there is time for another.
    ///
    /// # Errors
    /// The record cannot be written.
    fn keep(&mut self, record: &Record) -> Result<bool, Error>;
}

/// Searches, from what the record holds on.
///
/// # Errors
/// What the usual schedules give cannot be measured, or the record cannot be written.
pub fn tune(bench: &mut dyn Bench, target: Target, record: &mut Record) -> Result<Ended, Error> {
    let mut best = Table::default();
    let Some(mut time) = timed(bench, record, &best)? else {
        return Err(Error::Internal("the usual schedules were not measured".to_owned()));
    };
    record.products = best.clone();
    'again: loop {
        let products = bench.products(&best)?;
        for one in &products {
            let name = one.name(target);
            for choice in one.choice.neighbours(&one.spec, target) {
                let other = with(&best, &name, &choice, &Choice::usual(&one.spec, target));
                if record.known(&other).is_none() && !bench.keep(record)? {
                    return Ok(Ended::Budget);
                }
                let Some(faster) = timed(bench, record, &other)?.filter(|t| gain(&time, t) > GAIN) else { continue };
                (best, time) = (other, faster);
                record.products = best.clone();
                continue 'again;
            }
        }
        record.complete = true;
        bench.keep(record)?;
        return Ok(Ended::Best);
    }
}

/// The table with another choice for one product; usual ones are left out.
fn with(table: &Table, name: &str, choice: &Choice, usual: &Choice) -> Table {
    let mut table = table.clone();
    if choice == usual {
        table.0.remove(name);
    } else {
        table.0.insert(name.to_owned(), choice.clone());
    }
    table
}

/// Times with a table, from the record or measured now; `None` for one that does not run.
fn timed(bench: &mut dyn Bench, record: &mut Record, table: &Table) -> Result<Option<Vec<f64>>, Error> {
    if let Some(tried) = record.known(table) {
        return Ok(tried.microseconds.clone());
    }
    let microseconds = match bench.measure(table) {
        Ok(times) => Some(times),
        // What is usual must run; of the others, some may not fit a device.
        Err(error) if table.0.is_empty() => return Err(error),
        Err(_) => None,
    };
    record.tried.push(Tried { products: table.clone(), microseconds: microseconds.clone() });
    Ok(microseconds)
}

/// How much faster `new` is in the geometric mean over numbers of tokens, as a share.
fn gain(old: &[f64], new: &[f64]) -> f64 {
    let sum: f64 = old.iter().zip(new).map(|(old, new)| (old / new).ln()).sum();
    (sum / old.len().max(1) as f64).exp() - 1.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use moec_abi::DType;
    use moec_codegen::grouped::{Epilogue, Grouped, RowScale, RowSource};

    /// A device on which low tiles are fast, and a budget of so many measurements.
    struct Low {
        left: usize,
        measured: usize,
        kept: usize,
    }

    fn spec() -> Grouped {
        Grouped {
            symbol: "up".into(),
            experts: 8,
            rows: RowSource::Gathered,
            rows_per_token: 2,
            matrices: 1,
            first: 0,
            given: Vec::new(),
            k: 1024,
            n: 512,
            a_stride: 1024,
            out_stride: 512,
            a: DType::Bf16,
            w: DType::Bf16,
            codes: None,
            out: DType::Bf16,
            bias: false,
            scale: RowScale::None,
            epilogue: Epilogue::Sum(0),
        }
    }

    impl Bench for Low {
        fn products(&mut self, table: &Table) -> Result<Vec<TunedProduct>, Error> {
            Ok(vec![TunedProduct { spec: spec(), choice: table.choice(&spec(), Target::Sm90a) }])
        }

        fn measure(&mut self, table: &Table) -> Result<Vec<f64>, Error> {
            self.measured += 1;
            let choice = table.choice(&spec(), Target::Sm90a);
            if choice.rare_rows == 0 {
                return Err(Error::Internal("does not fit".into()));
            }
            Ok(vec![1.0 + f64::from(choice.tallest), 2.0 + choice.few_tokens as f64])
        }

        fn keep(&mut self, _: &Record) -> Result<bool, Error> {
            self.kept += 1;
            self.left = self.left.saturating_sub(1);
            Ok(self.left > 0)
        }
    }

    #[test]
    fn the_fastest_is_found_and_a_search_goes_on_where_it_stopped() {
        let bench = |left| Low { left, measured: 0, kept: 0 };
        let mut whole = Record::new("low", &[1, 1024]);
        let mut device = bench(1000);
        assert_eq!(tune(&mut device, Target::Sm90a, &mut whole).unwrap(), Ended::Best);
        let chosen = whole.products.choice(&spec(), Target::Sm90a);
        assert_eq!((chosen.tallest, chosen.few_tokens), (16, 0));
        assert!(whole.complete && device.measured == whole.tried.len() && whole.tried.len() > 5);
        assert!(whole.tried.iter().any(|t| t.microseconds.is_none()), "what fails is known as well");

        let mut parts = Record::new("low", &[1, 1024]);
        let mut measured = 0;
        for _ in 0..100 {
            let mut device = bench(3);
            let ended = tune(&mut device, Target::Sm90a, &mut parts).unwrap();
            measured += device.measured;
            // Each part goes through a file.
            parts = Record::from_json(&serde_json::to_string(&parts).unwrap()).unwrap();
            if ended == Ended::Best {
                break;
            }
        }
        assert_eq!(parts, whole);
        assert_eq!(measured, whole.tried.len(), "nothing is measured twice");
    }

    #[test]
    fn numbers_of_a_table_may_be_any() {
        for (few_tokens, rare_rows, tallest) in [(u64::MAX, u64::MAX, u32::MAX), (0, 0, 0), (1, 1, 17)] {
            let choice = Choice { few_tokens, rare_rows, tallest };
            let kernels = moec_codegen::gpu::variants_as(&spec(), Target::Sm90a, &choice);
            let follow = kernels.windows(2).all(|two| two[0].tokens[1] + 1 == two[1].tokens[0]);
            assert!(follow && kernels[0].tokens[0] == 0, "{choice:?}");
            let limits = kernels.iter().rev().skip(1).map(|k| k.tokens[1]);
            assert!(limits.into_iter().all(|l| l <= 8 * 256), "{choice:?}");
            assert_eq!(kernels.last().map(|k| k.tokens[1]), Some(u64::MAX), "every number of tokens has a kernel");
        }
    }

    #[test]
    fn files_that_are_no_records_are_refused() {
        for text in [
            "",
            "{}",
            "[]",
            r#"{"schema": 2, "device": "", "tokens": [], "complete": false, "products": {}, "tried": []}"#,
        ] {
            let Err(Error::Input(found)) = Record::from_json(text) else { panic!("{text} is taken") };
            assert_eq!(found[0].code.0, "E0404");
        }
    }
}
