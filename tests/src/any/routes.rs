//! Routes of every kind.

use super::Any;
use serde_json::{Map, Value, json};

impl Any {
    /// A weighted route of rows `x`.
    pub(super) fn route(&mut self, x: &str) -> String {
        let route = match self.draw.below(10) {
            0 => self.product_key(x),
            1 => self.given(),
            2 => self.expert_choice(x),
            3 => self.transported(x),
            _ => self.token_choice(x),
        };
        self.revised(&route)
    }

    /// What may happen to any weighted route.
    fn revised(&mut self, route: &str) -> String {
        let mut route = route.to_owned();
        if self.draw.one_in(8) {
            self.batch();
            let capacity = 1 + self.draw.below(self.rows.1);
            route = self.add("limit", &[&route], json!({"capacity": capacity}));
        }
        if self.draw.one_in(8) {
            let (size, rows) = self.rows.clone();
            let when = self.integers("when", &json!([size]), rows, [0, 2]);
            let expert = self.experts;
            self.experts += 1;
            route = self.add("override", &[&route], json!({"when": when, "expert": expert, "experts": expert + 1}));
        }
        if self.draw.one_in(6) {
            let count = self.add("count", &[&route], json!({}));
            self.output("count", &count);
        }
        route
    }

    /// A router matrix, one for each pass inside a loop.
    fn router(&mut self, shape: Value) -> String {
        let Some(passes) = self.passes else { return self.weight("router", shape) };
        let name = self.name("router");
        for i in 0..passes {
            let form = std::mem::take(&mut self.form);
            self.form = form.tensor(&format!("{name}.{i}"), shape.clone());
        }
        format!("{name}.{{i}}")
    }

    fn linear(&mut self, x: &str, out: u64) -> String {
        let w = self.weight("lw", json!([out, self.width]));
        self.add("linear", &[x], json!({"w": w}))
    }

    fn product_key(&mut self, x: &str) -> String {
        let n = self.draw.of(&[2, 3, 4]);
        self.experts = n * n;
        let k = 1 + self.draw.below(4.min(n * n));
        let found = match self.draw.below(3) {
            0 => {
                let half = self.draw.of(&[1, 4, 5]);
                let query = self.linear(x, 2 * half);
                let [k1, k2] = ["k1", "k2"].map(|name| self.weight(name, json!([n, half])));
                self.add("product_key", &[&query], json!({"kind": "sum", "k1": k1, "k2": k2, "k": k}))
            }
            1 => {
                let [a, b] = [n, n].map(|n| self.linear(x, n));
                self.add("product_key", &[&a, &b], json!({"kind": "scores", "k": k}))
            }
            _ => {
                let (size, rank) = (self.draw.of(&[3, 4]), self.draw.of(&[1, 2]));
                let [a, b] = [size, size].map(|n| self.linear(x, n));
                let keys = ["k1", "k2"].map(|name| {
                    let w = self.weight(name, json!([n, size, rank]));
                    self.add("param", &[], json!({"w": w}))
                });
                let core = self.weight("core", json!([rank, rank]));
                let [u, v] = ["cu", "cv"].map(|name| self.weight(name, json!([rank])));
                let [k1, k2] = keys;
                let attributes = json!({"kind": "tucker", "k1": k1, "k2": k2, "core": core, "u": u, "v": v, "k": k});
                self.add("product_key", &[&a, &b], attributes)
            }
        };
        let attributes = if self.draw.one_in(2) { json!({"fn": "softmax"}) } else { json!({}) };
        self.add("weigh", &[&found], attributes)
    }

    /// Ids that are data, or follow from a class.
    fn given(&mut self) -> String {
        let (size, rows) = self.rows.clone();
        let slots = 1 + self.draw.below(3);
        let experts = self.experts;
        let end = i32::try_from(experts).expect("few");
        let ids = if experts > 1 && self.draw.one_in(3) {
            let class = self.integers("class", &json!([size]), rows, [0, 5]);
            let table = self.typed("table", "i32", json!([5, slots]));
            self.add("gather", &[&class], json!({"w": table}))
        } else {
            self.integers("ids", &json!([size, slots]), rows * slots, [-1, end])
        };
        let selected = self.add("select", &[&ids], json!({"rule": "given", "experts": experts}));
        let scale = self.draw.of(&[1.0, 0.5]);
        self.add("weigh", &[&selected], json!({"const": true, "scale": scale}))
    }

    fn expert_choice(&mut self, x: &str) -> String {
        self.batch();
        let logits = self.linear(x, self.experts);
        let scores = self.add("unary", &[&logits], json!({"fn": "sigmoid"}));
        let adjusted = self.adjusted(&scores);
        let rule = if self.draw.one_in(2) {
            json!({"rule": "expert_choice", "capacity": 1 + self.draw.below(self.rows.1)})
        } else {
            json!({"rule": "expert_choice", "factor": self.draw.of(&[0.2, 0.5, 1.0])})
        };
        let selected = self.add("select", &[&adjusted], rule);
        self.add("weigh", &[&selected, &scores], json!({}))
    }

    fn transported(&mut self, x: &str) -> String {
        self.batch();
        let logits = self.linear(x, self.experts);
        let scores = self.add("softmax", &[&logits], json!({}));
        let k = 1 + self.draw.below(self.experts.min(3));
        // The plan of few rows has equal entries.
        if self.rows.1 > 2 && self.draw.one_in(2) {
            let (xi, iters) = (self.draw.of(&[0.5, 1.0]), self.draw.of(&[1, 5, 20]));
            let plan = self.add("transport", &[&scores], json!({"kind": "sinkhorn", "xi": xi, "iters": iters}));
            let selected = self.add("select", &[&plan], json!({"rule": "topk", "k": k}));
            return self.add("weigh", &[&selected, &plan], json!({"norm": "sum"}));
        }
        // Steps of more than two over the number of experts overshoot, and rounding errors grow.
        let (capacity, steps) = (1 + self.draw.below(self.rows.1), self.draw.of(&[1, 10]));
        let attributes = json!({"kind": "sparse", "capacity": capacity, "gamma": 1.0, "steps": steps, "eta": 0.1});
        let plan = self.add("transport", &[&scores], attributes);
        let selected = self.add("select", &[&plan], json!({"rule": "threshold", "tau": 0.001}));
        self.add("weigh", &[&selected, &scores], json!({}))
    }

    /// Scores with additive and hard changes.
    fn adjusted(&mut self, scores: &str) -> String {
        let experts = self.experts;
        let (size, rows) = self.rows.clone();
        let mut adjust = Map::new();
        if self.draw.one_in(4) {
            adjust.insert("add".into(), json!(self.weight("bias", json!([experts]))));
        }
        if experts > 1 && self.draw.one_in(8) {
            let class = self.integers("class", &json!([size]), rows, [0, 3]);
            let half = experts.div_ceil(2);
            let lists = json!({"0": (0..half).collect::<Vec<_>>(), "1": (half..experts).collect::<Vec<_>>(),
                "2": (0..experts).collect::<Vec<_>>()});
            adjust.insert("class".into(), json!(class));
            adjust.insert("class_experts".into(), lists);
        }
        if self.draw.one_in(8) {
            let mask = self.input("mask", "f32", &json!([size, experts]));
            adjust.insert("mask".into(), json!(mask));
        }
        if experts > 2 && self.draw.one_in(5) {
            adjust.insert("off".into(), json!([self.draw.below(experts - 1)]));
        }
        if experts > 2 && self.draw.one_in(5) {
            adjust.insert("on".into(), json!([experts - 1]));
        }
        if adjust.is_empty() {
            return scores.to_owned();
        }
        self.add("adjust", &[scores], Value::Object(adjust))
    }

    /// A selection whose bound may be an argument of the run.
    fn chosen(&mut self, scores: &str, rule: Value) -> String {
        let (mut rule, name) = (rule.clone(), rule["rule"].as_str().unwrap_or_default().to_owned());
        if !self.draw.one_in(5) || !["topk", "topp"].contains(&name.as_str()) {
            return self.add("select", &[scores], rule);
        }
        let bound = if name == "topk" {
            let most = i32::try_from(rule["k"].as_u64().unwrap_or(1)).expect("few");
            self.integers("k", &json!([1]), 1, [1, most + 1])
        } else {
            self.input("p", "f32", &json!([1]))
        };
        rule["bound"] = json!(bound);
        self.add("select", &[scores], rule)
    }

    fn limited(&mut self, route: &str, scores: &str) -> String {
        self.batch();
        let size = if self.draw.one_in(2) {
            json!({"capacity": 1 + self.draw.below(self.rows.1)})
        } else {
            json!({"fraction": self.draw.of(&[0.1, 0.3, 0.6])})
        };
        let mut attributes = size;
        if self.draw.one_in(2) {
            attributes["priority"] = json!("score");
            return self.add("limit", &[route, scores], attributes);
        }
        self.add("limit", &[route], attributes)
    }

    /// A route of one column with some of the rows.
    fn some_rows(&mut self) -> String {
        self.batch();
        let size = self.rows.0.clone();
        let importance = self.input("importance", "f32", &json!([size, 1]));
        let capacity = 1 + self.draw.below(self.rows.1);
        self.add("select", &[&importance], json!({"rule": "expert_choice", "capacity": capacity}))
    }

    pub(super) fn token_choice(&mut self, x: &str) -> String {
        let (experts, width) = (self.experts, self.width);
        let mut linear = json!({"w": self.router(json!([experts, width]))});
        if self.draw.one_in(3) {
            linear["b"] = json!(self.weight("rb", json!([experts])));
        }
        let logits = self.add("linear", &[x], linear);
        // Positive scores may be divided by their sum.
        let (scores, positive) = match self.draw.below(6) {
            0 | 1 => {
                let temp = self.draw.of(&[1.0, 0.5, 2.0]);
                (self.add("softmax", &[&logits], json!({"temp": temp})), true)
            }
            2 => (self.add("unary", &[&logits], json!({"fn": "sigmoid"})), true),
            3 => {
                let soft = self.add("unary", &[&logits], json!({"fn": "softplus"}));
                (self.add("unary", &[&soft], json!({"fn": "sqrt"})), true)
            }
            4 => (self.add("unary", &[&logits], json!({"fn": "tanh"})), false),
            _ => (logits, false),
        };
        let adjusted = self.adjusted(&scores);
        let k = 1 + self.draw.below(experts.min(4));
        let rule = match self.draw.below(9) {
            0 => {
                let mut ranks: Vec<u64> = (0..k).collect();
                ranks.reverse();
                json!({"rule": "rank", "ranks": ranks})
            }
            1 => json!({"rule": "all"}),
            2 => json!({"rule": "topp", "p": 0.55, "strict": self.draw.one_in(2), "max_k": k}),
            3 => json!({"rule": "threshold", "tau": 0.2, "max_k": k, "min_k": self.draw.below(2)}),
            4 => json!({"rule": "threshold", "quantile": 0.6, "strict": false, "max_k": k, "min_k": 1}),
            5 if experts.is_multiple_of(2) => {
                json!({"rule": "group_topk", "groups": experts / 2, "k": 1 + self.draw.below(2)})
            }
            6 if experts.is_multiple_of(4) => json!({"rule": "group_limited", "groups": experts / 2,
                "group_top": 1 + self.draw.below(2), "keep_groups": 2, "k": k.min(4)}),
            7 if experts.is_multiple_of(3) => {
                json!({"rule": "group_limited", "groups": 3, "group_top": 1, "keep_groups": 3, "k": k.min(3)})
            }
            _ => json!({"rule": "topk", "k": k}),
        };
        let mut selected = self.chosen(&adjusted, rule);
        if self.draw.one_in(8) {
            selected = self.limited(&selected, &scores);
        }
        let mut weigh = Map::new();
        if self.draw.one_in(3) {
            weigh.insert("fn".into(), json!(self.draw.of(&["softmax", "sigmoid"])));
        }
        if self.draw.one_in(6) && experts > 1 {
            weigh.insert("real".into(), json!(experts - 1));
        }
        if positive || weigh.contains_key("fn") {
            if self.draw.one_in(4) {
                weigh.insert("drop_below".into(), json!(0.4));
                for name in ["drop_rows", "keep_rows"] {
                    if self.draw.one_in(3) {
                        let set = self.some_rows();
                        weigh.insert(name.into(), json!(set));
                    }
                }
            }
            if self.draw.one_in(2) {
                weigh.insert("norm".into(), json!("sum"));
                if self.draw.one_in(2) {
                    weigh.insert("eps".into(), json!(0.05));
                }
            }
        }
        if self.draw.one_in(4) {
            let scales = self.weight("es", json!([experts]));
            weigh.insert("expert_scale".into(), json!(scales));
        }
        if self.draw.one_in(4) {
            weigh.insert("scale".into(), json!(1.75));
        }
        self.add("weigh", &[&selected, &scores], Value::Object(weigh))
    }
}
