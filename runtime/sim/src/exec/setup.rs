//! Making clusters, blocks, warps and frames.

use super::guests::Guests;
use super::state::{At, Bar, Block, Frame, Group, Warp};
use super::{Cluster, ClusterBar, Env, GlobalSync, Spare};
use crate::clock::{Clock, Memo, View};
use crate::memory::Plain;
use crate::op::{Slot, Special, V};
use crate::report::{Counts, Findings};
use crate::shadow::Shadow;
use crate::space;
use crate::syntax::Space;
use std::collections::BTreeMap;
use std::rc::Rc;

impl<'e> Cluster<'e> {
    /// A cluster at the start of its kernel. `id` counts clusters, x first.
    pub(crate) fn new(env: &'e Env<'e>, id: u32, sync: GlobalSync, spare: &mut Spare) -> Cluster<'e> {
        let empty = Rc::new(Clock::default());
        let n = env.cluster_size();
        let mut c = Cluster {
            env,
            id,
            blocks: Vec::new(),
            flights: Vec::new(),
            rng: (env.seed.wrapping_add(1)).wrapping_mul(0x9e37_79b9_7f4a_7c15)
                ^ (u64::from(id) + 1).wrapping_mul(0xd134_2543_de82_ef95)
                | 1,
            memo: Memo::default(),
            agents: BTreeMap::new(),
            waited: Vec::new(),
            before: Rc::new(Clock::after_launches()),
            next_component: 2 * n * env.block_size(),
            sync,
            cluster_bar: ClusterBar::default(),
            acquired_maps: BTreeMap::new(),
            findings: Findings::default(),
            counts: Counts::default(),
            executed: vec![(0, 0); env.code.insts.len()],
            effects: 0,
            last_alloc: 0,
            steps: 0,
            order: Vec::new(),
            idle: 0,
            empty,
            registers: std::mem::take(&mut spare.registers),
        };
        let per = [0, 1, 2].map(|i| env.grid[i] / env.cluster[i]);
        let at = [id % per[0], id / per[0] % per[1], id / per[0] / per[1]];
        for rank in 0..n {
            let [cx, cy, _] = env.cluster;
            let inside = [rank % cx, rank / cx % cy, rank / cx / cy];
            let ctaid = [0, 1, 2].map(|i| at[i] * env.cluster[i] + inside[i]);
            c.add_block(ctaid, spare.shared.pop().unwrap_or_default());
        }
        for b in 0..c.blocks.len() {
            for w in 0..c.blocks[b].warps.len() {
                c.order.push((b, w));
            }
        }
        c
    }

    /// Gives the memory of its blocks to clusters after it.
    pub(crate) fn give_back(&mut self, spare: &mut Spare) {
        spare.registers.append(&mut self.registers);
        for block in &mut self.blocks {
            spare.shared.push((std::mem::take(&mut block.smem), std::mem::take(&mut block.shadow)));
            let frames = block.warps.iter_mut().flat_map(|w| &mut w.frames);
            spare.registers.extend(frames.map(|f| (f.func, std::mem::take(&mut f.regs))));
        }
    }

    fn add_block(&mut self, ctaid: [u32; 3], (mut smem, mut shadow): (Plain, Shadow)) {
        let env = self.env;
        let threads = env.threads();
        let shared = env.shared_end as usize;
        smem.clear(shared);
        shadow.clear(if env.check { shared } else { 0 });
        let block = Block {
            ctaid,
            smem,
            shadow,
            guests: Guests::default(),
            warps: Vec::new(),
            bars: (0..16).map(|_| Bar { all: true, ..Bar::default() }).collect(),
            mbars: BTreeMap::new(),
            sync: BTreeMap::new(),
            exited: false,
            awaited: false,
        };
        self.blocks.push(block);
        let b = self.blocks.len() - 1;
        for w in 0..threads.div_ceil(32) as usize {
            let n = (threads - w as u32 * 32).min(32);
            let mask = if n == 32 { u32::MAX } else { (1 << n) - 1 };
            let mut warp = Warp {
                lanes: mask,
                live: mask,
                views: (0..32).map(|_| View::new(&self.empty, env.cluster_size() * env.block_size())).collect(),
                copies: (0..32).map(|_| super::state::CopyGroups::default()).collect(),
                ..Warp::default()
            };
            let frame = self.new_frame(At { block: b, warp: w }, &mut warp, env.entry, 0, 0, 0, mask);
            let start = env.code.funcs[env.entry].start;
            warp.groups.push(Group::new(start, frame, 0, mask));
            self.blocks[b].warps.push(warp);
        }
    }

    /// A frame for `func`; one that is free is used again.
    #[expect(clippy::too_many_arguments, reason = "a frame is all of these")]
    pub(super) fn new_frame(
        &mut self,
        at: At,
        warp: &mut Warp,
        func: usize,
        parent: u32,
        call_pc: u32,
        local_base: u64,
        mask: u32,
    ) -> u32 {
        let f = &self.env.code.funcs[func];
        let local_end = local_base + f.local_bytes.next_multiple_of(16);
        if local_end > warp.local_size {
            let size = local_end.next_power_of_two().max(256);
            let mut local = vec![0xff; size as usize * 32];
            let old = warp.local_size as usize;
            for l in 0..32 {
                local[l * size as usize..l * size as usize + old].copy_from_slice(&warp.local[l * old..(l + 1) * old]);
            }
            warp.local = local;
            warp.local_size = size;
        }
        let free = warp.free_frames.iter().position(|i| warp.frames[*i as usize].func == func);
        let id = match free {
            Some(i) => warp.free_frames.swap_remove(i),
            None => {
                let used = self.registers.iter().rposition(|(f, _)| *f == func);
                let mut regs = used.map(|i| self.registers.swap_remove(i).1).unwrap_or_default();
                self.slots(at, func, &mut regs);
                warp.frames.push(Frame {
                    func,
                    regs,
                    area: vec![0xff; f.area_bytes as usize * 32],
                    ..Frame::default()
                });
                warp.frames.len() as u32 - 1
            }
        };
        let frame = &mut warp.frames[id as usize];
        frame.parent = parent;
        frame.call_pc = call_pc;
        frame.local_base = local_base;
        frame.lanes = mask;
        for (slot, reg) in f.slots.iter().zip(&mut frame.regs) {
            if let Slot::Local(o) = slot {
                *reg = [local_base.wrapping_add(*o as u64); 32];
            }
        }
        id
    }

    fn slots(&self, at: At, func: usize, into: &mut Vec<V>) {
        let env = self.env;
        let slots = &env.code.funcs[func].slots;
        // What no instruction writes is there already where the slots were those of the same function.
        let new = into.is_empty();
        into.resize(slots.len(), [0; 32]);
        for (i, (s, v)) in slots.iter().zip(into).enumerate() {
            *v = match s {
                Slot::Const(_) | Slot::Variable(..) | Slot::Local(_) if !new => continue,
                // Undefined registers differ from seed to seed, so that a result made of one does too.
                Slot::Register(ty) => {
                    let poison = (env.seed ^ i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 0x8000_0000;
                    let bits = ty.bits();
                    [if *ty == crate::syntax::Ty::Pred {
                        poison >> 40 & 1
                    } else if bits >= 64 {
                        poison
                    } else {
                        poison & ((1 << bits) - 1)
                    }; 32]
                }
                Slot::Const(v) => [*v; 32],
                Slot::Special(s) => self.special(at, *s),
                Slot::Variable(v, o) => {
                    let base = env.var_addr[*v];
                    let var = &env.code.vars[*v].var;
                    debug_assert!(var.space != Space::Param);
                    [base.wrapping_add(*o as u64); 32]
                }
                Slot::Local(_) => [0; 32],
            };
        }
    }

    fn special(&self, at: At, s: Special) -> V {
        let env = self.env;
        let block = &self.blocks[at.block];
        let rank = at.block as u32;
        let [cx, cy, _] = env.cluster;
        let inside = [rank % cx, rank / cx % cy, rank / cx / cy];
        let mut out = [0u64; 32];
        for (l, o) in out.iter_mut().enumerate() {
            let bit = 1u32 << l;
            *o = u64::from(match s {
                Special::Tid(i) => self.thread_index(at, l)[i],
                Special::Ntid(i) => env.block[i],
                Special::Ctaid(i) => block.ctaid[i],
                Special::Nctaid(i) => env.grid[i],
                Special::Clusterid(i) => block.ctaid[i] / env.cluster[i],
                Special::Nclusterid(i) => env.grid[i] / env.cluster[i],
                Special::ClusterCtaid(i) => inside[i],
                Special::ClusterNctaid(i) => env.cluster[i],
                Special::ClusterCtarank => rank,
                Special::ClusterNctarank => env.cluster_size(),
                Special::IsExplicitCluster => u32::from(env.cluster_size() > 1),
                Special::Laneid => l as u32,
                Special::Warpid => at.warp as u32,
                Special::Nwarpid => env.threads().div_ceil(32),
                Special::Smid => self.id % 132,
                Special::Nsmid => 132,
                Special::Gridid => 1,
                Special::LanemaskEq => bit,
                Special::LanemaskLe => bit | (bit - 1),
                Special::LanemaskLt => bit - 1,
                Special::LanemaskGe => !(bit - 1),
                Special::LanemaskGt => !(bit | (bit - 1)),
                Special::DynamicSharedSize => env.dynamic_shared,
                Special::TotalSharedSize => (env.shared_end - space::SHARED_BASE) as u32,
                Special::GridWorkspace { upper } => (env.workspace >> if upper { 32 } else { 0 }) as u32,
            });
        }
        out
    }
}
