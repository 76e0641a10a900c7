//! Compiles what `tests/gpu` takes to a machine with a GPU: `gpu-artefacts OUT [PART OF A NAME]` writes
//! `OUT/goldens/NAME` for every case of `tests/goldens` and `OUT/layers/NAME` for every layer of `tests/gpu/layers.json`.

use anyhow::{Context as _, Result, anyhow, bail};
use moec::{Artefact, Compiler, Target, ptxas, runtime::SafetensorsBytes, verify::golden};
use serde_json::Value;
use std::path::{Path, PathBuf};

const HERE: &str = env!("CARGO_MANIFEST_DIR");

/// The config of a layer: a released one, with fields set anew and (where the value is null) taken out.
fn config(layer: &Value) -> Result<String> {
    let path = Path::new(HERE).join(layer["config"].as_str().context("a layer has a config")?);
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).context(path.display().to_string())?)?;
    let fields = config.as_object_mut().context("a config is an object")?;
    for (key, value) in layer["with"].as_object().into_iter().flatten() {
        fields.remove(key);
        if !value.is_null() {
            fields.insert(key.clone(), value.clone());
        }
    }
    Ok(config.to_string())
}

fn refused(error: impl std::fmt::Debug) -> anyhow::Error {
    anyhow!("{error:?}")
}

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let out = PathBuf::from(args.next().context("usage: gpu-artefacts OUT [PART OF A NAME]")?);
    let part = args.next().unwrap_or_default();
    if ptxas::find().found.is_none() {
        eprintln!("no ptxas: the driver will compile the PTX");
    }
    let outputs = golden::OUTPUTS.map(str::to_owned).to_vec();
    let compiler = Compiler { targets: vec![Target::Sm90a], outputs, cubins: true, ..Compiler::default() };
    let write = |artefact: &Artefact, folder: &Path| -> Result<u64> {
        std::fs::create_dir_all(folder.parent().context("a folder in OUT")?)?;
        Ok(artefact.write(folder)?)
    };
    let mut all = 0;
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(Path::new(HERE).join("goldens"))?.map(|e| Ok(e?.path())).collect::<Result<_>>()?;
    files.retain(|f| f.extension().is_some_and(|e| e == "safetensors"));
    files.sort();
    for file in files {
        let name = file.file_stem().context("a file has a name")?.to_string_lossy().into_owned();
        if !name.contains(&part) {
            continue;
        }
        let bytes = std::fs::read(&file)?;
        let artefact = golden::compile(&SafetensorsBytes::new(&bytes)?, &compiler).context(name.clone())?;
        all += write(&artefact, &out.join("goldens").join(&name)).context(name)?;
    }
    let layers: Value = serde_json::from_slice(&std::fs::read(Path::new(HERE).join("gpu/layers.json"))?)?;
    for layer in layers.as_array().into_iter().flatten() {
        let name = layer["name"].as_str().context("a layer has a name")?;
        if !name.contains(&part) {
            continue;
        }
        let model = moec_frontend::read_config(&config(layer)?, name).map_err(refused)?;
        let Some(form) = model.forms.first() else { bail!("{name} has no layer") };
        let artefact = compiler.compile_forms(&model.name, std::slice::from_ref(form))?;
        all += write(&artefact, &out.join("layers").join(name)).context(name.to_owned())?;
    }
    println!("{} KiB in {}", all / 1024, out.display());
    Ok(())
}
