//! The codes of this crate's findings, with their titles.

use moec_ir::Code;

/// Every code that reading a model or its weights can give.
pub const ALL: &[(Code, &str)] = &[
    (Code("E0101"), "an empty file"),
    (Code("E0102"), "text in another encoding than UTF-8"),
    (Code("E0103"), "text that is not JSON"),
    (Code("E0104"), "more than one value in a file"),
    (Code("E0105"), "a top level that is no object"),
    (Code("E0106"), "a key that stands twice"),
    (Code("E0107"), "a control character in a key or string"),
    (Code("E0108"), "brackets nested too deep"),
    (Code("E0109"), "a file that is too large"),
    (Code("E0110"), "too many keys"),
    (Code("E0111"), "a number that JSON does not have"),
    (Code("E0112"), "a model that cannot be read"),
    (Code("E0201"), "a value of the wrong kind"),
    (Code("E0202"), "a number out of range"),
    (Code("E0203"), "more experts per token than experts"),
    (Code("E0204"), "a key that is missing or null"),
    (Code("E0205"), "an unknown model type"),
    (Code("E0206"), "a model type and a class of different families"),
    (Code("E0207"), "sizes that overflow 64 bits"),
    (Code("E0208"), "an unknown key that looks like part of the mixture"),
    (Code("E0209"), "a size beyond what is compiled"),
    (Code("E0210"), "expert groups that do not fit"),
    (Code("E0211"), "two spellings of a key that disagree"),
    (Code("E0212"), "an unknown function or method"),
    (Code("E0213"), "an unknown or impossible quantization"),
    (Code("E0214"), "a layer pattern that does not fit the layers"),
    (Code("E0215"), "a model without mixture layers"),
    (Code("E0301"), "no weights"),
    (Code("E0302"), "shards that are not there"),
    (Code("E0303"), "a tensor that is missing"),
    (Code("E0304"), "a tensor of the wrong type"),
    (Code("E0305"), "a tensor of the wrong shape"),
    (Code("E0306"), "a weights file that is broken"),
    (Code("E0307"), "a file outside the model's folder"),
    (Code("E0308"), "a tensor in two places"),
    (Code("E0309"), "something that is no readable file"),
    (Code("E0310"), "a pickle"),
    (Code("E0311"), "a file that changed while it was read"),
    (Code("E0312"), "a Git LFS pointer instead of weights"),
    (Code("E0313"), "an archive instead of weights"),
    (Code("W0201"), "an unknown key"),
    (Code("W0202"), "a mixture of one expert"),
    (Code("W0203"), "a config without element type"),
    (Code("W0204"), "a part of the config that is not used"),
    (Code("W0301"), "weights that are rounded when they are loaded"),
];

#[cfg(test)]
mod tests {
    use super::ALL;
    use std::{collections::BTreeSet, fs, path::Path};

    fn sources(folder: &Path, into: &mut String) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                sources(&path, into);
            } else if path.extension().is_some_and(|e| e == "rs") && path.file_name().unwrap() != "codes.rs" {
                into.push_str(&fs::read_to_string(path).unwrap());
            }
        }
    }

    #[test]
    fn every_code_is_listed_once_and_explained() {
        let listed: BTreeSet<&str> = ALL.iter().map(|(code, _)| code.0).collect();
        assert_eq!(listed.len(), ALL.len());
        let mut text = String::new();
        sources(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/src")), &mut text);
        let mut used = BTreeSet::new();
        for (at, _) in text.match_indices("\"E0").chain(text.match_indices("\"W0")) {
            let code = text.get(at + 1..at + 6).unwrap();
            if text.as_bytes().get(at + 6) == Some(&b'"') && code[1..].bytes().all(|b| b.is_ascii_digit()) {
                used.insert(code);
            }
        }
        assert_eq!(used.difference(&listed).collect::<Vec<_>>(), Vec::<&&str>::new(), "used but not listed");
        assert_eq!(listed.difference(&used).collect::<Vec<_>>(), Vec::<&&str>::new(), "listed but never used");
        for code in listed {
            let path = format!("{}/cli/codes/{code}.md", env!("CARGO_MANIFEST_DIR"));
            let page = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
            for heading in ["## Cause", "## Example", "## Fix"] {
                assert!(page.contains(heading), "{code} has no {heading}");
            }
        }
    }
}
