//! The pages behind `moec explain`.

/// Every code with its page; sorted by code.
pub(crate) const PAGES: &[(&str, &str)] = include!(concat!(env!("OUT_DIR"), "/pages.rs"));

/// The page of a code, however it is spelt.
pub(crate) fn page(code: &str) -> Option<&'static str> {
    PAGES.iter().find(|(known, _)| known.eq_ignore_ascii_case(code)).map(|(_, page)| *page)
}

/// The title of a page: its first line without the code.
pub(crate) fn title(page: &str) -> &str {
    let first = page.lines().next().unwrap_or("");
    first.split_once(": ").map_or(first, |(_, title)| title)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_of_every_crate_has_a_page() {
        let frontend = moec::frontend::codes::ALL.iter().map(|(code, _)| code.0);
        let ir = moec::ir::codes::ALL.iter().map(|(code, _)| code.0);
        let runtime = moec::runtime::Code::ALL.iter().map(|code| code.as_str());
        let place = moec::place::Code::ALL.iter().map(|code| code.as_str());
        let plan = {
            use moec::plan::error::*;
            [E_MAPPING, E_CLUSTER, E_MODEL, E_NO_PLAN]
        };
        let own = [
            "E0314", "E0401", "E0403", "E0407", "E0408", "E0503", "E0504", "E0601", "E0602", "E0603", "E0604", "E0605",
        ];
        for code in frontend.chain(ir).chain(runtime).chain(place).chain(plan).chain(own) {
            let page = page(code).unwrap_or_else(|| panic!("{code} has no page"));
            assert!(page.starts_with(&format!("# {code}: ")), "{code}");
            for heading in ["## Cause", "## Fix"] {
                assert!(page.contains(heading), "{code} has no {heading}");
            }
        }
    }
}
