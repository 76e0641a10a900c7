//! Control flow, barriers, fences and warp-wide instructions.

use super::{Decoder, Symbol, last_type};
use crate::Error;
use crate::clock::Scope;
use crate::op::{BarKind, Call, CallValue, Collective, NONE, Op, Reg, Rmw, ShflMode, Vote, Where};
use crate::syntax::{Name, Operand, Operands, Ty};

impl Decoder<'_> {
    pub(super) fn control(&mut self, p: Name<'_>, o: Operands<'_>) -> Result<bool, Error> {
        match p[0] {
            "bra" => {
                let Operand::Word(label) = &o[0] else { return self.expected("a label", &o[0]) };
                self.branch(Op::Bra { target: 0 }, vec![label.clone()]);
            }
            "brx" => {
                let index = self.source(&o[0], Ty::U32)?;
                let Operand::Word(name) = &o[1] else { return self.expected("a list of labels", &o[1]) };
                let Some(Symbol::Targets(list)) = self.find(name) else {
                    return self.parse_error(format!("`{name}` is no list of labels"));
                };
                self.branch(Op::Brx { index, targets: Vec::new() }, list);
            }
            "call" => self.call(o)?,
            "ret" => self.emit(Op::Ret),
            "exit" => self.emit(Op::Exit),
            "trap" | "brkpt" => self.emit(Op::Trap),
            "griddepcontrol" if p[1] == "wait" => self.emit(Op::LaunchWait),
            "griddepcontrol" if p[1] == "launch_dependents" => self.emit(Op::LaunchNext),
            // Hints and sleeps change no result.
            "nanosleep" | "pmevent" | "discard" | "applypriority" | "prefetch" | "prefetchu" => {
                for x in o.iter().filter(|x| matches!(x, Operand::Word(_))) {
                    self.source(x, Ty::B32)?;
                }
                self.emit(Op::Nop);
            }
            "createpolicy" => {
                let d = self.dest(&o[0])?;
                let zero = self.literal(0);
                self.copy(d, zero, 64);
            }
            "setmaxnreg" => self.emit(Op::SetMaxReg),
            "bar" | "barrier" => return self.barrier(p, o),
            "fence" | "membar" => return self.fence(p, o),
            "shfl" | "vote" | "match" | "redux" | "elect" | "activemask" => return self.warp(p, o),
            "mapa" => {
                let generic = !p.iter().any(|s| s.starts_with("shared"));
                let (a, rank) = (self.source(&o[1], Ty::B64)?, self.source(&o[2], Ty::B32)?);
                let d = self.dest(&o[0])?;
                self.emit(Op::Mapa { d, a, rank, generic });
            }
            "getctarank" => {
                let a = self.source(&o[1], Ty::B64)?;
                let d = self.dest(&o[0])?;
                self.emit(Op::GetCtaRank { d, a });
            }
            "isspacep" => {
                let place = match p.get(1).copied() {
                    Some("global") => Where::Global,
                    Some("shared" | "shared::cta") => Where::Shared,
                    Some("shared::cluster") => Where::SharedCluster,
                    Some("local") => Where::Local,
                    Some("const") => Where::Const,
                    Some("param") => Where::KernelParam,
                    _ => return Ok(false),
                };
                let a = self.source(&o[1], Ty::B64)?;
                let d = self.dest(&o[0])?;
                self.emit(Op::IsSpace { d, a, place });
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn branch(&mut self, op: Op, labels: Vec<String>) {
        let scopes = self.scopes.iter().map(|s| s.0).collect();
        self.pending.push((self.code.insts.len(), scopes, labels));
        self.emit(op);
    }

    fn call(&mut self, o: Operands<'_>) -> Result<(), Error> {
        let mut rest = &*o;
        let mut rets = Vec::new();
        if let [Operand::Group(list), tail @ ..] = rest {
            rets = self.call_values(list, true)?;
            rest = tail;
        }
        let [Operand::Word(name), tail @ ..] = rest else { return self.parse_error("call without a function") };
        let mut args = Vec::new();
        if let [Operand::Group(list), ..] = tail {
            args = self.call_values(list, false)?;
        }
        let target = match self.names.get(name) {
            Some(f) => {
                self.calls.push(*f);
                let sig = &self.signatures[*f];
                if sig.params.len() != args.len() || (sig.rets.len() != rets.len()) {
                    return self.parse_error(format!(
                        "`{name}` takes {} parameters and returns {}",
                        sig.params.len(),
                        sig.rets.len()
                    ));
                }
                Ok(*f)
            }
            None => {
                self.indirect = true;
                Err(self.source(&Operand::Word(name.clone()), Ty::B64)?)
            }
        };
        self.emit(Op::Call(Box::new(Call { target, args, rets })));
        Ok(())
    }

    fn call_values(&mut self, list: &[Operand], define: bool) -> Result<Vec<CallValue>, Error> {
        let mut out = Vec::new();
        for x in list {
            if let Operand::Word(w) = x
                && let Some(Symbol::FrameParam(at)) = self.find(w)
            {
                out.push(CallValue::Area(at));
                continue;
            }
            let r = if define { self.dest(x)? } else { self.source(x, Ty::B64)? };
            out.push(CallValue::Reg(r));
        }
        Ok(out)
    }

    fn barrier(&mut self, p: Name<'_>, o: Operands<'_>) -> Result<bool, Error> {
        if p.contains(&"cluster") {
            let op = if p.contains(&"arrive") {
                Op::ClusterArrive { release: !p.contains(&"relaxed") }
            } else {
                Op::ClusterWait { acquire: true }
            };
            self.emit(op);
            return Ok(true);
        }
        if p.get(1) == Some(&"warp") {
            let mask = self.source(&o[0], Ty::B32)?;
            self.emit(Op::Collective { op: Box::new(Collective::Barrier), mask });
            return Ok(true);
        }
        // `bar` is `barrier.aligned`.
        let aligned = p[0] == "bar" || p.contains(&"aligned");
        let kind = if p.contains(&"arrive") {
            BarKind::Arrive
        } else if p.contains(&"sync") {
            BarKind::Sync
        } else if p.contains(&"popc") {
            BarKind::RedPopc
        } else if p.contains(&"and") {
            BarKind::RedAnd
        } else if p.contains(&"or") {
            BarKind::RedOr
        } else {
            return Ok(false);
        };
        let (mut d, mut pr, mut negate) = (self.sink(), NONE, false);
        let mut rest = o;
        if matches!(kind, BarKind::RedAnd | BarKind::RedOr | BarKind::RedPopc) {
            d = self.dest(&o[0])?;
            (pr, negate) = self.pred(&o[o.len().max(3) - 1])?;
            rest = o.but_last().after(1);
        }
        let id = self.source(&rest[0], Ty::U32)?;
        let count = match rest.get(1) {
            Some(c) => self.source(c, Ty::U32)?,
            None => NONE,
        };
        self.emit(Op::Bar { kind, id, count, d, p: pr, negate, aligned });
        Ok(true)
    }

    pub(super) fn scope(p: Name<'_>) -> Scope {
        for s in p.iter() {
            match *s {
                "cta" => return Scope::Cta,
                "cluster" => return Scope::Cluster,
                "gpu" | "gl" | "sys" => return Scope::Gpu,
                _ => {}
            }
        }
        Scope::Gpu
    }

    fn fence(&mut self, p: Name<'_>, o: Operands<'_>) -> Result<bool, Error> {
        if p.contains(&"proxy") {
            if p.iter().any(|s| s.starts_with("tensormap")) && p.contains(&"acquire") {
                let addr = self.address(&o[0])?;
                self.emit(Op::MapFence { scope: Self::scope(p), addr });
            } else if p.iter().any(|s| s.starts_with("async")) {
                self.emit(Op::ProxyFence);
            } else if p.contains(&"alias") || p.iter().any(|s| s.starts_with("tensormap")) {
                self.emit(Op::Fence { scope: Self::scope(p) });
            } else {
                return Ok(false);
            }
            return Ok(true);
        }
        if p.contains(&"mbarrier_init") {
            self.emit(Op::Fence { scope: Scope::Cluster });
            return Ok(true);
        }
        self.emit(Op::Fence { scope: Self::scope(p) });
        Ok(true)
    }

    fn warp(&mut self, p: Name<'_>, o: Operands<'_>) -> Result<bool, Error> {
        if p[0] == "activemask" {
            let d = self.dest(&o[0])?;
            self.emit(Op::ActiveMask { d });
            return Ok(true);
        }
        if !p.contains(&"sync") {
            return self.unsupported("forms without .sync ended with sm_70");
        }
        let collective = match p[0] {
            "shfl" => {
                let mode = match p[2] {
                    "up" => ShflMode::Up,
                    "down" => ShflMode::Down,
                    "bfly" => ShflMode::Bfly,
                    "idx" => ShflMode::Idx,
                    _ => return Ok(false),
                };
                let (a, b, c) =
                    (self.source(&o[1], Ty::B32)?, self.source(&o[2], Ty::B32)?, self.source(&o[3], Ty::B32)?);
                let (d, pr) = self.dest_pair(&o[0])?;
                Collective::Shfl { mode, d, p: pr, a, b, c }
            }
            "vote" => {
                let kind = match p[2] {
                    "all" => Vote::All,
                    "any" => Vote::Any,
                    "uni" => Vote::Uni,
                    "ballot" => Vote::Ballot,
                    _ => return Ok(false),
                };
                let (a, negate) = self.pred(&o[1])?;
                let d = self.dest(&o[0])?;
                Collective::Vote { kind, d, a, negate }
            }
            "match" => {
                let bits = last_type(p).map_or(32, Ty::bits);
                let a = self.source(&o[1], Ty::B64)?;
                let (d, pr) = self.dest_pair(&o[0])?;
                if p[1] == "any" {
                    Collective::MatchAny { d, a, bits }
                } else {
                    Collective::MatchAll { d, p: pr, a, bits }
                }
            }
            "redux" => {
                let Some(ty) = last_type(p) else { return Ok(false) };
                let op = match p[2] {
                    "add" => Rmw::Add,
                    "min" => Rmw::Min,
                    "max" => Rmw::Max,
                    "and" => Rmw::And,
                    "or" => Rmw::Or,
                    "xor" => Rmw::Xor,
                    _ => return Ok(false),
                };
                let a = self.source(&o[1], ty)?;
                let d = self.dest(&o[0])?;
                Collective::Redux { op, ty, d, a, abs: p.contains(&"abs"), nan: p.contains(&"NaN") }
            }
            _ => {
                let (d, pr) = self.dest_pair(&o[0])?;
                Collective::Elect { d, p: pr }
            }
        };
        let mask_at = match p[0] {
            "shfl" => 4,
            "elect" => 1,
            _ => 2,
        };
        let mask: Reg = self.source(&o[mask_at], Ty::B32)?;
        self.emit(Op::Collective { op: Box::new(collective), mask });
        Ok(true)
    }
}
