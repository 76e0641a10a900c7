//! Asynchronous copies and mbarriers.

use super::Decoder;
use crate::Error;
use crate::clock::Scope;
use crate::op::{Addr, Bulk, BulkKind, Mbar, NONE, Op, Order, Reg, Rmw, Where};
use crate::syntax::{Name, Operand, Operands, Ty};

impl Decoder<'_> {
    pub(super) fn asynchronous(&mut self, p: Name<'_>, o: Operands<'_>) -> Result<bool, Error> {
        match p[0] {
            "cp" => match (p.get(1).copied(), p.get(2).copied()) {
                (Some("async"), Some("commit_group")) => self.emit(Op::CpAsyncCommit),
                (Some("async"), Some("wait_group")) => {
                    let pending = self.constant(&o[0])? as u32;
                    self.emit(Op::CpAsyncWait { pending, all: false });
                }
                (Some("async"), Some("wait_all")) => self.emit(Op::CpAsyncWait { pending: 0, all: true }),
                (Some("async"), Some("mbarrier")) => {
                    let addr = self.address(&o[0])?;
                    self.emit(Op::Mbar {
                        place: Self::place(p),
                        addr,
                        op: Box::new(Mbar::AfterCopies { no_increment: p.contains(&"noinc") }),
                    });
                }
                (Some("async"), Some("bulk")) => self.bulk(p, o, None)?,
                (Some("async"), Some("ca" | "cg")) => self.cp_async(p, o)?,
                (Some("reduce"), Some("async")) => {
                    let op = p.iter().find_map(|s| {
                        Some(match *s {
                            "add" => Rmw::Add,
                            "min" => Rmw::Min,
                            "max" => Rmw::Max,
                            "and" => Rmw::And,
                            "or" => Rmw::Or,
                            "xor" => Rmw::Xor,
                            "inc" => Rmw::Inc,
                            "dec" => Rmw::Dec,
                            _ => return None,
                        })
                    });
                    let Some(op) = op else { return self.unsupported("operation") };
                    let ty = p.last().and_then(|s| Ty::parse(s));
                    self.bulk(p, o, Some((op, ty)))?;
                }
                _ => return Ok(false),
            },
            "mbarrier" => self.mbarrier(p, o)?,
            "tensormap" => self.tensormap(p, o)?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn cp_async(&mut self, p: Name<'_>, o: Operands<'_>) -> Result<(), Error> {
        let (dst, src) = (self.address(&o[0])?, self.address(&o[1])?);
        let size = self.constant(&o[2])? as u32;
        let hint = p.contains(&"L2::cache_hint");
        let extra = if hint { o.but_last() } else { o }.after(3);
        let (mut src_size, mut ignore) = (NONE, NONE);
        if let Some(x) = extra.first() {
            let is_pred = match x {
                Operand::Word(w) => matches!(self.find(w), Some(super::Symbol::Reg(_, Ty::Pred))),
                _ => false,
            };
            let r = self.source(x, Ty::B32)?;
            if is_pred {
                ignore = r;
            } else {
                src_size = r;
            }
        }
        if !matches!(size, 4 | 8 | 16) || (p[2] == "cg" && size != 16) {
            return self.unsupported("copy size");
        }
        self.emit(Op::CpAsync { dst, src, size, src_size, ignore });
        Ok(())
    }

    /// The base and the coordinates of `[map, {x, y, ..}]`.
    fn tensor_address(&mut self, o: &Operand) -> Result<(Addr, Vec<Reg>), Error> {
        let Operand::Mem(_, _, extra) = o else { return self.expected("a tensor address", o) };
        let base = self.address(o)?;
        let Some(coords) = extra.first() else { return self.parse_error("tensor address without coordinates") };
        let coords = self.source_list(coords, Ty::S32)?;
        Ok((base, coords))
    }

    fn bulk(&mut self, p: Name<'_>, o: Operands<'_>, reduce: Option<(Rmw, Option<Ty>)>) -> Result<(), Error> {
        let has = |s: &str| p.contains(&s);
        if has("commit_group") {
            self.emit(Op::BulkCommit);
            return Ok(());
        }
        if has("wait_group") {
            let pending = self.constant(&o[0])? as u32;
            self.emit(Op::BulkWait { pending, read: has("read") });
            return Ok(());
        }
        if p.iter().any(|s| {
            s.starts_with("im2col") || s.starts_with("tile::") || s.starts_with("cta_group") || *s == "cp_mask"
        }) {
            return self.unsupported("this mode is not in the simulator");
        }
        let tensor = has("tensor");
        let hint = has("L2::cache_hint");
        let o = if hint { o.but_last() } else { o };
        let none = Addr { base: 0, offset: 0 };
        let mut b = Bulk {
            kind: BulkKind::Load,
            shared: none,
            shared_place: Where::Shared,
            global: none,
            size: NONE,
            mbar: None,
            mask: NONE,
            coords: Vec::new(),
            reduce,
        };
        if has("prefetch") {
            b.kind = BulkKind::Prefetch;
            if tensor {
                (b.global, b.coords) = self.tensor_address(&o[0])?;
            } else {
                b.global = self.address(&o[0])?;
                b.size = self.source(&o[1], Ty::U32)?;
            }
            self.emit(Op::Bulk(Box::new(b)));
            return Ok(());
        }
        // The first space in the name is the destination.
        let spaces: Vec<&str> =
            p.iter().copied().filter(|s| matches!(*s, "global" | "shared::cluster" | "shared::cta")).collect();
        let [to, from] = spaces[..] else { return self.unsupported("spaces") };
        match (to, from) {
            ("global", "shared::cta") => {
                b.kind = BulkKind::Store;
                if tensor {
                    (b.global, b.coords) = self.tensor_address(&o[0])?;
                    b.shared = self.address(&o[1])?;
                } else {
                    b.global = self.address(&o[0])?;
                    b.shared = self.address(&o[1])?;
                    b.size = self.source(&o[2], Ty::U32)?;
                }
            }
            (_, "global") => {
                b.shared_place = if to == "shared::cta" { Where::Shared } else { Where::SharedCluster };
                b.shared = self.address(&o[0])?;
                let mut at = 2;
                if tensor {
                    (b.global, b.coords) = self.tensor_address(&o[1])?;
                } else {
                    b.global = self.address(&o[1])?;
                    b.size = self.source(&o[2], Ty::U32)?;
                    at = 3;
                }
                b.mbar = Some(self.address(&o[at])?);
                if has("multicast::cluster") {
                    b.mask = self.source(&o[at + 1], Ty::B16)?;
                }
            }
            ("shared::cluster", "shared::cta") => {
                // Destination in `global`, which here is an address of the cluster.
                b.kind = BulkKind::Exchange;
                b.global = self.address(&o[0])?;
                b.shared = self.address(&o[1])?;
                b.size = self.source(&o[2], Ty::U32)?;
                b.mbar = Some(self.address(&o[3])?);
            }
            _ => return self.unsupported("spaces"),
        }
        self.emit(Op::Bulk(Box::new(b)));
        Ok(())
    }

    fn mbarrier(&mut self, p: Name<'_>, o: Operands<'_>) -> Result<(), Error> {
        let has = |s: &str| p.contains(&s);
        let place = Self::place(p);
        let relaxed = has("relaxed");
        let scope = if has("cluster") { Scope::Cluster } else { Scope::Cta };
        let arrive_order = Order { strong: true, acquire: false, release: !relaxed, scope };
        let wait_order = Order { strong: true, acquire: !relaxed, release: false, scope };
        let Some(name) = p.get(1) else { return self.unsupported("form") };
        let (addr, op) = match *name {
            "init" => {
                let count = self.source(&o[1], Ty::U32)?;
                (self.address(&o[0])?, Mbar::Init { count })
            }
            "inval" => (self.address(&o[0])?, Mbar::Inval),
            "arrive" | "arrive_drop" => {
                let has_dest = !matches!(o.first(), Some(Operand::Mem(..)));
                let d = if has_dest { self.dest(&o[0])? } else { self.sink() };
                let rest = o.after(usize::from(has_dest));
                let extra = match rest.get(1) {
                    Some(x) => self.source(x, Ty::U32)?,
                    None => NONE,
                };
                let (count, expect_tx) = if has("expect_tx") { (NONE, extra) } else { (extra, NONE) };
                (
                    self.address(&rest[0])?,
                    Mbar::Arrive { d, count, expect_tx, drop: *name == "arrive_drop", order: arrive_order },
                )
            }
            "expect_tx" => {
                let tx = self.source(&o[1], Ty::U32)?;
                (self.address(&o[0])?, Mbar::ExpectTx { tx })
            }
            "complete_tx" => {
                let tx = self.source(&o[1], Ty::U32)?;
                (self.address(&o[0])?, Mbar::CompleteTx { tx })
            }
            "test_wait" | "try_wait" => {
                let state = self.source(&o[2], Ty::B64)?;
                if let Some(hint) = o.get(3) {
                    self.source(hint, Ty::U32)?;
                }
                let d = self.dest(&o[0])?;
                let suspends = *name == "try_wait";
                (self.address(&o[1])?, Mbar::Wait { d, state, parity: has("parity"), suspends, order: wait_order })
            }
            "pending_count" => {
                let state = self.source(&o[1], Ty::B64)?;
                let d = self.dest(&o[0])?;
                (Addr { base: state, offset: 0 }, Mbar::PendingCount { d, state })
            }
            _ => return self.unsupported("operation"),
        };
        let place = if place == Where::Generic { Where::Generic } else { place };
        self.emit(Op::Mbar { place, addr, op: Box::new(op) });
        Ok(())
    }

    fn tensormap(&mut self, p: Name<'_>, o: Operands<'_>) -> Result<(), Error> {
        if p.get(1) == Some(&"cp_fenceproxy") {
            let (to, from) = (self.address(&o[0])?, self.address(&o[1])?);
            self.emit(Op::TensormapCopy { to, from });
            return Ok(());
        }
        if p.get(1) != Some(&"replace") {
            return self.unsupported("operation");
        }
        let fields = [
            "global_address",
            "rank",
            "box_dim",
            "global_dim",
            "global_stride",
            "element_stride",
            "elemtype",
            "interleave_layout",
            "swizzle_mode",
            "fill_mode",
        ];
        let Some(field) = fields.iter().position(|f| p.contains(f)) else { return self.unsupported("field") };
        let indexed = (2..=5).contains(&field);
        let (index, value) = if indexed { (self.constant(&o[1])? as u32, &o[2]) } else { (0, &o[1]) };
        let value = self.source(value, Ty::B64)?;
        let addr = self.address(&o[0])?;
        self.emit(Op::TensormapReplace { place: Self::place(p), addr, field: field as u8, index, value });
        Ok(())
    }
}
