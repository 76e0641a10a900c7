//! Rank groups against the published vectors, and their laws on many sizes.

use moec_plan::{Mapping, groups, mapping::divisors};
use serde_json::Value;
use std::collections::BTreeSet;

fn vectors() -> Vec<Value> {
    let file: Value = serde_json::from_str(include_str!("data/rank-groups.json")).unwrap();
    file["vectors"].as_array().unwrap().clone()
}

#[test]
fn every_published_vector_comes_out_exactly() {
    let vectors = vectors();
    assert_eq!(vectors.len(), 25);
    for v in &vectors {
        let int = |key: &str| v["input"][key].as_u64().unwrap();
        let mapping = Mapping { tp: int("tp"), cp: int("cp"), pp: int("pp"), ep: int("ep"), etp: int("etp") };
        let result = groups(int("world"), &mapping, v["input"]["order"].as_str().unwrap());
        match (&result, v["expected"]["error"].as_str()) {
            (Ok(groups), None) => assert_eq!(serde_json::to_value(groups).unwrap(), v["expected"], "{}", v["id"]),
            (Err(error), Some(reason)) => {
                assert_eq!((error.code, error.message.as_str()), ("E0402", reason), "{}", v["id"]);
                assert!(!error.help.is_empty());
            }
            (result, expected) => panic!("{}: {result:?}, expected {expected:?}", v["id"]),
        }
    }
}

/// A fixed pseudo-random sequence, so that a failure repeats.
struct Sequence(u64);

impl Sequence {
    fn pick(&mut self, from: &[u64]) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        from[(self.0 >> 33) as usize % from.len()]
    }
}

#[test]
fn each_rank_is_in_exactly_one_group_per_dimension() {
    let mut random = Sequence(7);
    let mut accepted = 0;
    for _ in 0..3000 {
        let world = random.pick(&[1, 2, 6, 8, 12, 24, 30, 32, 48, 60, 64, 96, 128, 210]);
        let all = divisors(world);
        let mapping = Mapping {
            tp: random.pick(&all),
            cp: random.pick(&all),
            pp: random.pick(&all),
            ep: random.pick(&all),
            etp: random.pick(&all),
        };
        let orders = [
            "tp-cp-ep-dp-pp",
            "tp-ep-cp-dp-pp",
            "ep-tp-cp-dp-pp",
            "cp-tp-ep-dp-pp",
            "tp-cp-ep-pp-dp",
            "dp-tp-cp-ep-pp",
        ];
        let order = orders[random.pick(&[0, 1, 2, 3, 4, 5]) as usize];
        let Ok(found) = groups(world, &mapping, order) else { continue };
        accepted += 1;
        let (a, e) = (&found.attention, &found.moe);
        let sized = [
            (&a.tp, mapping.tp),
            (&a.cp, mapping.cp),
            (&a.dp, found.dp),
            (&a.pp, mapping.pp),
            (&a.dp_cp, found.dp * mapping.cp),
            (&a.tp_cp, mapping.tp * mapping.cp),
            (&a.tp_pp, mapping.tp * mapping.pp),
            (&e.etp, mapping.etp),
            (&e.ep, mapping.ep),
            (&e.edp, found.edp),
            (&e.pp, mapping.pp),
            (&e.etp_ep, mapping.etp * mapping.ep),
            (&e.etp_ep_pp, mapping.etp * mapping.ep * mapping.pp),
        ];
        for (list, size) in sized {
            let ranks: Vec<u32> = list.iter().flatten().copied().collect();
            assert_eq!(ranks.len() as u64, world, "{world} {mapping:?} {order}");
            assert_eq!(ranks.iter().collect::<BTreeSet<_>>().len() as u64, world, "{world} {mapping:?} {order}");
            assert!(list.iter().all(|group| group.len() as u64 == size), "{world} {mapping:?} {order}");
        }
        assert_eq!(a.pp, e.pp, "pipeline groups agree: {world} {mapping:?} {order}");
    }
    assert!(accepted > 300, "{accepted}");
}

#[test]
fn orders_and_sizes_that_cannot_be_are_refused_with_a_way_out() {
    let ok = Mapping::ONE;
    for order in ["", "tp-tp-dp", "tp-cp-xp-dp-pp", "tp-cp-ep-pp"] {
        let error = groups(8, &ok, order).unwrap_err();
        assert_eq!(error.code, "E0402");
        assert!(error.help.contains("tp-cp-ep-dp-pp"), "{order}: {error:?}");
    }
    for mapping in [
        Mapping { tp: 3, ..ok },
        Mapping { ep: 0, ..ok },
        Mapping { pp: u64::MAX, ..ok },
        Mapping { tp: 1 << 40, ..ok },
    ] {
        let error = groups(8, &mapping, "tp-cp-ep-dp-pp").unwrap_err();
        assert!(error.help.contains('8'), "{error:?}");
    }
    assert!(groups(0, &ok, "tp-cp-ep-dp-pp").is_err());
    assert!(groups(1 << 60, &ok, "tp-cp-ep-dp-pp").unwrap_err().message.contains("outside"));
}

/// Groups by definition: each rank's coordinates, ranks that agree on all axes outside the token, groups in the
/// order of their outer coordinates and members in the order of their inner ones, first axes fastest.
fn by_definition(world: u64, sizes: &[(&str, u64)], token: &[&str]) -> Vec<Vec<u32>> {
    let coordinates = |rank: u64| {
        let mut rest = rank;
        sizes
            .iter()
            .map(|(_, size)| {
                let c = rest % size;
                rest /= size;
                c
            })
            .collect::<Vec<_>>()
    };
    let key = |rank: u64, inner: bool| {
        let kept = coordinates(rank).into_iter().zip(sizes).filter(|(_, (name, _))| token.contains(name) == inner);
        let mut key: Vec<u64> = kept.map(|(c, _)| c).collect();
        key.reverse();
        key
    };
    let mut all: Vec<u64> = (0..world).collect();
    all.sort_by_key(|&r| (key(r, false), key(r, true)));
    let mut groups: Vec<Vec<u32>> = Vec::new();
    for (index, &rank) in all.iter().enumerate() {
        if index == 0 || key(all[index - 1], false) != key(rank, false) {
            groups.push(Vec::new());
        }
        groups.last_mut().unwrap().push(rank as u32);
    }
    groups
}

#[test]
fn groups_in_any_order_follow_the_definition() {
    let axes = ["tp", "cp", "ep", "dp", "pp"];
    let mut random = Sequence(11);
    let mut accepted = 0;
    for _ in 0..4000 {
        let mut order = axes;
        for i in (1..5).rev() {
            order.swap(i, random.pick(&(0..=i as u64).collect::<Vec<_>>()) as usize);
        }
        let pick = |random: &mut Sequence| random.pick(&[1, 1, 1, 2, 2, 3, 4]);
        let m = Mapping {
            tp: pick(&mut random),
            cp: pick(&mut random),
            pp: pick(&mut random),
            ep: pick(&mut random),
            etp: pick(&mut random),
        };
        let world = m.tp * m.cp * m.pp * random.pick(&[1, 2, 3, 4, 6, 8]);
        let Ok(found) = groups(world, &m, &order.join("-")) else { continue };
        accepted += 1;
        let sized = |attention: bool| -> Vec<(&str, u64)> {
            order
                .iter()
                .map(|&axis| {
                    (
                        axis,
                        match (axis, attention) {
                            ("tp", true) => m.tp,
                            ("tp", false) => m.etp,
                            ("cp", true) => m.cp,
                            ("ep", false) => m.ep,
                            ("dp", true) => world / (m.tp * m.cp * m.pp),
                            ("dp", false) => world / (m.etp * m.ep * m.pp),
                            ("pp", _) => m.pp,
                            _ => 1,
                        },
                    )
                })
                .collect()
        };
        let (a, e) = (&found.attention, &found.moe);
        for (list, token) in [
            (&a.tp, &["tp"][..]),
            (&a.cp, &["cp"]),
            (&a.dp, &["dp"]),
            (&a.pp, &["pp"]),
            (&a.dp_cp, &["dp", "cp"]),
            (&a.tp_cp, &["tp", "cp"]),
            (&a.tp_pp, &["tp", "pp"]),
        ] {
            assert_eq!(*list, by_definition(world, &sized(true), token), "{world} {m:?} {order:?} {token:?}");
        }
        for (list, token) in [
            (&e.etp, &["tp"][..]),
            (&e.ep, &["ep"]),
            (&e.edp, &["dp"]),
            (&e.pp, &["pp"]),
            (&e.etp_ep, &["tp", "ep"]),
            (&e.etp_ep_pp, &["tp", "ep", "pp"]),
        ] {
            assert_eq!(*list, by_definition(world, &sized(false), token), "{world} {m:?} {order:?} experts {token:?}");
        }
    }
    assert!(accepted > 300, "{accepted}");
}
