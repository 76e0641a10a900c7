//! The folder that a compilation leaves: what goes in, and writing it whole or not at all.

use crate::{
    Artefact, Error,
    files::{self, Scratch},
    host,
    library::{self, Variant},
};
use moec_abi::Program;
use moec_codegen::Target;
use std::{
    fs,
    path::{Path, PathBuf},
};

/// Programs of this artefact that run on processors of this kind, best first, by form.
fn host_variants(programs: &[Program]) -> Vec<Vec<&Program>> {
    let mut forms: Vec<Vec<&Program>> = Vec::new();
    for program in programs {
        let runs = Target::from_name(&program.target)
            .is_some_and(|t| !t.is_gpu() && t.triple().starts_with(std::env::consts::ARCH));
        if !runs {
            continue;
        }
        match forms.iter_mut().find(|f| f.iter().any(|p| p.name == program.name)) {
            Some(form) => form.push(program),
            None => forms.push(vec![program]),
        }
    }
    for form in &mut forms {
        form.sort_by_key(|p| std::cmp::Reverse(moec_abi::cpu_level(&p.target)));
    }
    forms
}

impl Artefact {
    /// Adds what hosts need beside manifest and kernels: graphs, headers, the static library, an example.
    ///
    /// # Errors
    /// Only by our bugs.
    pub fn package(&mut self) -> Result<(), Error> {
        for form in &self.forms {
            self.files.insert(format!("graph/{}.moe", form.name), moec_ir::print(&form.graph).into_bytes());
        }
        let model = self.manifest.model.clone();
        let forms = host_variants(&self.manifest.programs);
        let mut members = Vec::new();
        let mut headers = Vec::new();
        for programs in &forms {
            let none: &[u8] = &[];
            let variants: Vec<Variant<'_>> = programs
                .iter()
                .map(|program| Variant { program, object: self.files.get(&program.code).map_or(none, Vec::as_slice) })
                .collect();
            let Some(first) = programs.first() else { continue };
            let form = library::form(&variants)?;
            members.extend(form.members);
            headers.push((first.name.clone(), form.header, form.rust));
        }
        let Some(example) = forms.first().and_then(|f| f.first()).map(|p| host::example(p, &model)) else {
            return Ok(());
        };
        if headers.len() > 1 {
            let guard = model.to_uppercase();
            let includes: String = headers.iter().map(|(name, ..)| format!("#include \"{name}.h\"\n")).collect();
            let all = format!(
                "/* All layer forms of {model}. */\n#ifndef {guard}_H\n#define {guard}_H\n\n{includes}\n#endif\n"
            );
            self.files.insert(format!("{model}.h"), all.into_bytes());
        }
        for (name, header, rust) in headers {
            self.files.insert(format!("{name}.h"), header.into_bytes());
            self.files.insert(format!("{name}.rs"), rust.into_bytes());
        }
        self.files.insert(format!("lib{model}.a"), library::archive(&members)?);
        self.files.insert(format!("{model}.pc"), host::pkg_config(&model).into_bytes());
        self.files.insert(format!("{model}Config.cmake"), host::cmake(&model).into_bytes());
        self.files.insert("example.c".to_owned(), example.into_bytes());
        Ok(())
    }

    /// The manifest as it is written.
    ///
    /// # Errors
    /// Only by our bugs.
    pub fn manifest_json(&self) -> Result<String, Error> {
        let mut text = serde_json::to_string_pretty(&self.manifest).map_err(|e| Error::Internal(e.to_string()))?;
        text.push('\n');
        Ok(text)
    }

    /// Writes the folder and says how many bytes it has. An artefact that was there is replaced at once, when
    /// everything is written; on failure it is as before.
    ///
    /// # Errors
    /// The folder is something else than an artefact, or the system refuses.
    pub fn write(&self, folder: &Path) -> Result<u64, Error> {
        files::replaceable(folder)?;
        let scratch = Scratch::beside(folder)?;
        let mut bytes = 0;
        let manifest = self.manifest_json()?;
        let all = self.files.iter().map(|(name, content)| (name.as_str(), content.as_slice()));
        for (name, content) in all.chain([("manifest.json", manifest.as_bytes())]) {
            let path: PathBuf = scratch.path().join(name);
            let write = || {
                if let Some(parent) = path.parent() {
                    fs::create_dir_all(parent).map_err(|e| files::failure("create", parent, &e))?;
                }
                files::write_new(&path, content).map_err(|e| files::failure("write", folder, &e))
            };
            files::step(write)?;
            bytes += content.len() as u64;
        }
        scratch.replace(folder)?;
        Ok(bytes)
    }
}
