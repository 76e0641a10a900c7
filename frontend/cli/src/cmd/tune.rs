//! `moec bench --tune`: which schedules are fastest on a GPU.

use super::bench::{Spread, estimates, facts};
use crate::{args::Bench, context::Context, failure::Failure, wanted};
use moec::{
    Compiler, Error, Table, Target, TunedProduct,
    bench::{self, Options},
    frontend::{Form, Model},
    run::{self, Prepared},
    runtime::{Device, Sim},
    tune::{self, Ended, Record},
};
use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

/// Measures, for as long as the budget lasts, and writes the table.
pub(crate) fn run(cx: &Context, args: &Bench, routing: &Spread, file: &Path) -> Result<(), Failure> {
    let (device, target) = wanted::device(&args.on.device, args.on.threads, args.on.target.as_deref())?;
    if !target.is_gpu() {
        let help = "tune with --device cuda, or --device sim for its estimates";
        return Err(Failure::refused(
            "E0407",
            "schedules of CPU kernels follow from the layer, not from a table",
            help,
        ));
    }
    let routing = match routing {
        Spread::Made(routing) => routing.clone(),
        Spread::File(_) => return Err(Failure::Usage("`--tune` makes its own inputs: leave out file:".to_owned())),
    };
    let mut record = match std::fs::read_to_string(file) {
        Ok(text) => Record::from_json(&text)?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Record::new(&args.on.device, &args.tokens),
        Err(error) => {
            let message = format!("cannot read {}: {error}", file.display());
            return Err(Failure::refused("E0404", message, "name another file"));
        }
    };
    if record.device != args.on.device || record.tokens != args.tokens {
        let message = format!("{} was measured on {} for {:?} tokens", file.display(), record.device, record.tokens);
        return Err(Failure::refused("E0404", message, "use the same --device and --tokens, or another file"));
    }
    let source = wanted::model(cx, &args.what)?;
    let form = form(&source.model, args.on.layer)?;
    cx.say("Tuning", &format!("layer {} for {}", form.layers.first().copied().unwrap_or(0), target.name()));
    let sim = (args.on.device == "sim").then(|| Arc::new(Sim::new(moec::sim::Options::default())));
    let device = sim.clone().map_or(device, |sim| sim as Arc<dyn Device>);
    let weights = wanted::weights(&args.on.weights)?;
    let compiler = Compiler {
        targets: vec![target],
        outputs: wanted::outputs(&source.model, &["output", "topk_indices"]),
        ..Compiler::default()
    };
    let known = record.tried.len();
    let mut layer = Layer {
        cx,
        args,
        file,
        routing,
        form,
        compiler,
        device,
        sim,
        weights,
        start: Instant::now(),
        written: known,
        known,
    };
    let ended = tune::tune(&mut layer, target, &mut record)?;
    let (new, of) = (record.tried.len() - known, record.tried.len());
    let gained = gained(&record);
    cx.say("Measured", &format!("{new} schedules ({of} with earlier ones), {gained}"));
    cx.say(
        "Written",
        &format!(
            "{} ({})",
            file.display(),
            match ended {
                Ended::Best => "no change of one number is faster",
                Ended::Budget => "time was over; run again to go on",
            }
        ),
    );
    if cx.is_json() {
        cx.json(&serde_json::to_value(&record).map_err(|e| Failure::Bug(e.to_string()))?)
    } else {
        Ok(())
    }
}

/// The chosen schedules beside the usual ones.
fn gained(record: &Record) -> String {
    let of = |products: &Table| record.tried.iter().find(|t| t.products == *products)?.microseconds.clone();
    let (Some(usual), Some(chosen)) = (of(&Table::default()), of(&record.products)) else { return String::new() };
    let rows = record.tokens.iter().zip(usual.iter().zip(&chosen));
    let rows: Vec<String> = rows.map(|(t, (u, c))| format!("{t} tokens {u:.1} -> {c:.1} us")).collect();
    rows.join(", ")
}

fn form(model: &Model, layer: Option<u64>) -> Result<Form, Failure> {
    let found = model.forms.iter().find(|f| layer.is_none_or(|l| f.layers.contains(&l)));
    found.cloned().ok_or_else(|| {
        let have: Vec<u64> = model.forms.iter().flat_map(|f| f.layers.iter().copied()).collect();
        let help = format!("layers with experts: {}", super::check::ranges(&have));
        Failure::refused("E0215", format!("layer {} has no experts", layer.unwrap_or(0)), help)
    })
}

/// The layer that is compiled again and again.
struct Layer<'a> {
    cx: &'a Context,
    args: &'a Bench,
    file: &'a Path,
    routing: moec::routing::Routing,
    form: Form,
    compiler: Compiler,
    device: Arc<dyn Device>,
    /// The device, if it is the simulator.
    sim: Option<Arc<Sim>>,
    weights: run::Weights,
    start: Instant,
    /// Measurements in the file.
    written: usize,
    /// The same when the command began.
    known: usize,
}

impl Layer<'_> {
    fn compiled(&self, table: &Table) -> Result<moec::Artefact, Error> {
        let compiler = Compiler { tuned: table.clone(), ..self.compiler.clone() };
        compiler.compile_forms("tuned", std::slice::from_ref(&self.form))
    }
}

impl tune::Bench for Layer<'_> {
    fn products(&mut self, table: &Table) -> Result<Vec<TunedProduct>, Error> {
        let forms = self.compiled(table)?.forms;
        Ok(forms.into_iter().flat_map(|f| f.targets).flat_map(|t| t.products).collect())
    }

    fn measure(&mut self, table: &Table) -> Result<Vec<f64>, Error> {
        let artefact = Arc::new(self.compiled(table)?.load()?);
        let prepare = || run::prepare(&artefact, &self.device, None, &self.weights);
        let mut layers: Vec<Prepared> = vec![prepare()?];
        let facts = facts(&self.form.graph);
        let mut times = Vec::new();
        for &tokens in &self.args.tokens {
            let options = |launches| Options { tokens, routing: self.routing.clone(), launches, kernels_only: true };
            let graph = &self.form.graph;
            if let Some(sim) = &self.sim {
                sim.take_counts();
                bench::once(&layers[0], graph, &facts, &options(Some(1)))?;
                let all = estimates(layers[0].program()?, &sim.take_counts(), tokens, &facts);
                times.push(all.iter().map(|(_, e)| e.microseconds).sum());
                continue;
            }
            while layers.len() < bench::copies(layers[0].layer().weights_bytes()) {
                layers.push(prepare()?);
            }
            let row = bench::measure("tuned", &layers, graph, &facts, &options(self.args.reps), None)?;
            times.push(row.median_ms * 1e3);
        }
        Ok(times)
    }

    fn keep(&mut self, record: &Record) -> Result<bool, Error> {
        let spent: Duration = self.start.elapsed();
        if record.tried.len() > self.written || record.complete {
            self.written = record.tried.len();
            let text = serde_json::to_string_pretty(record).map_err(|e| Error::Internal(e.to_string()))?;
            moec::files::write(self.file, (text + "\n").as_bytes())?;
            let gained = gained(record);
            self.cx.detail("Tried", &format!("{} schedules in {:.0} s, {gained}", self.written, spent.as_secs_f64()));
        }
        // However short the time is, each run gets somewhere.
        Ok(spent < self.args.budget || self.written == self.known)
    }
}

/// The table of a file that tuning wrote, if one is named.
pub(crate) fn table(file: Option<&Path>) -> Result<Table, Failure> {
    let Some(file) = file else { return Ok(Table::default()) };
    let text = std::fs::read_to_string(file).map_err(|e| {
        Failure::refused("E0404", format!("cannot read {}: {e}", file.display()), "`moec bench --tune FILE` writes it")
    })?;
    Ok(Record::from_json(&text)?.products)
}

/// GPU targets with a product that nobody measured.
pub(crate) fn untuned<'a>(artefact: &'a moec::Artefact, table: &'a Table) -> impl Iterator<Item = Target> + 'a {
    let mut targets: Vec<Target> = artefact
        .forms
        .iter()
        .flat_map(|f| &f.targets)
        .filter(|t| t.products.iter().any(|p| !table.0.contains_key(&p.name(t.target))))
        .map(|t| t.target)
        .collect();
    targets.dedup();
    targets.into_iter()
}
