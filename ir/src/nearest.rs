//! The nearest of several names, for findings about an unknown one.

/// The candidate with the fewest changed, swapped, added or missing letters, if those are few: two, or a third of
/// the name's.
pub fn nearest<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let name: String = name.chars().take(80).collect();
    let few = (name.chars().count() / 3).max(2);
    let distances = candidates.into_iter().map(|c| (strsim::osa_distance(&name, c), c));
    distances.filter(|(d, _)| *d <= few).min_by_key(|(d, _)| *d).map(|(_, c)| c)
}
