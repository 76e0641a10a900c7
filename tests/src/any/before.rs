//! What may happen to tokens before they are routed.

use super::Any;
use serde_json::json;

impl Any {
    /// A value of the shape of `x`, which is an input with any number of tokens.
    pub(super) fn before(&mut self, x: &str) -> String {
        let value = self.changed(x);
        // Scores of large values are equal in f32, so that either expert may win.
        self.add("norm", &[&value], json!({"kind": "l2"}))
    }

    fn changed(&mut self, x: &str) -> String {
        let width = self.width;
        match self.draw.below(9) {
            0 | 1 => self.attended(x),
            2 => {
                // A state that the caller keeps.
                let state = self.input("state", "f32", &json!(["T", width]));
                let kept = self.add("binary", &[&state], json!({"fn": "mul", "c": 0.7}));
                let next = self.add("binary", &[&kept, x], json!({"fn": "add"}));
                self.output("state", &next);
                self.add("binary", &[x, &next], json!({"fn": "sub"}))
            }
            3 => {
                let [mean, var] = ["mean", "var"].map(|name| self.weight(name, json!([width])));
                self.add("norm", &[x], json!({"kind": "batch", "mean": mean, "var": var, "eps": 0.01}))
            }
            4 => {
                let function = self.draw.of(&["mean", "max", "min", "sum"]);
                let all = self.add("reduce", &[x], json!({"fn": function, "axis": 0, "keep": true}));
                let scaled = self.add("binary", &[&all], json!({"fn": "mul", "c": 0.1}));
                self.add("binary", &[x, &scaled], json!({"fn": "sub"}))
            }
            5 => {
                let scores = self.add("einsum", &[x, x], json!({"eq": "td,ud->tu"}));
                let scaled = self.add("binary", &[&scores], json!({"fn": "mul", "c": 0.2}));
                let shares = self.add("softmax", &[&scaled], json!({}));
                self.add("einsum", &[&shares, x], json!({"eq": "tu,ud->td"}))
            }
            6 => {
                let w = self.weight("rows", json!([width]));
                let function = self.draw.of(&["add", "mul", "min"]);
                let other = self.add("binary", &[x], json!({"fn": function, "w": w}));
                let both = self.add("shape", &[x, &other], json!({"fn": "stack", "axis": 1}));
                let turned = self.add("shape", &[&both], json!({"fn": "transpose", "perm": [0, 2, 1]}));
                self.add("reduce", &[&turned], json!({"fn": "mean", "axis": 2}))
            }
            7 => {
                let (size, rows) = self.rows.clone();
                let class = self.integers("class", &json!([size]), rows, [0, 4]);
                let table = self.weight("table", json!([4, width]));
                let row = self.add("gather", &[&class], json!({"w": table}));
                self.add("binary", &[x, &row], json!({"fn": "add"}))
            }
            _ => {
                let (function, flag) = (self.draw.of(&["sign", "abs", "exp", "tanh"]), self.draw.of(&["gt", "ge"]));
                // Half of it: a small number and its tanh are equal in f32.
                let other = self.add("unary", &[x], json!({"fn": function}));
                let other = self.add("binary", &[&other], json!({"fn": "mul", "c": 0.5}));
                let flag = self.add("binary", &[x, &other], json!({"fn": flag}));
                let half = self.add("binary", &[&flag], json!({"fn": "mul", "c": 0.5}));
                self.add("binary", &[x, &half], json!({"fn": "add"}))
            }
        }
    }

    /// Heads of attention over the blocks of keys that each query chooses.
    pub(super) fn blocked(&mut self, x: &str, block: u64) -> String {
        let (heads, size, rows) = (self.draw.of(&[1, 2]), self.draw.of(&[4, 8]), self.rows.1);
        let blocks = rows / block;
        let [q, k, v] = self.heads_of(x, heads, size);
        let split = json!({"fn": "reshape", "to": [blocks, block, heads, size]});
        let keys = self.add("shape", &[&k], split);
        let mean = self.add("reduce", &[&keys], json!({"fn": "mean", "axis": 1}));
        let scores = self.add("einsum", &[&q, &mean], json!({"eq": "thd,nhd->htn"}));
        let flat = self.add("shape", &[&scores], json!({"fn": "reshape", "to": [-1, blocks]}));
        let allowed = self.add("adjust", &[&flat], json!({"causal_block": block, "tokens": rows}));
        let k_blocks = 1 + self.draw.below(blocks);
        let route = self.add("select", &[&allowed], json!({"rule": "topk", "k": k_blocks}));
        let read = self.add("attention", &[&q, &k, &v], json!({"blocks": route, "block": block}));
        self.joined(x, &read, heads * size)
    }

    /// Queries, keys and values `[T, heads, size]`.
    fn heads_of(&mut self, x: &str, heads: u64, size: u64) -> [String; 3] {
        ["q", "k", "v"].map(|name| {
            let w = self.weight(name, json!([heads * size, self.width]));
            let flat = self.add("linear", &[x], json!({"w": w}));
            self.add("shape", &[&flat], json!({"fn": "reshape", "to": [-1, heads, size]}))
        })
    }

    /// What heads read, added to `x`.
    fn joined(&mut self, x: &str, read: &str, width: u64) -> String {
        let flat = self.add("shape", &[read], json!({"fn": "reshape", "to": [-1, width]}));
        let w = self.weight("o", json!([self.width, width]));
        let out = self.add("linear", &[&flat], json!({"w": w}));
        self.add("binary", &[x, &out], json!({"fn": "add"}))
    }

    /// Heads of attention over all tokens.
    fn attended(&mut self, x: &str) -> String {
        let (heads, size) = (self.draw.of(&[1, 2, 3]), self.draw.of(&[4, 8]));
        let [q, k, v] = self.heads_of(x, heads, size);
        let causal = self.draw.one_in(2);
        let read = self.add("attention", &[&q, &k, &v], json!({"causal": causal}));
        self.joined(x, &read, heads * size)
    }
}
