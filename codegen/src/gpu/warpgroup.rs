//! What a multiplying warpgroup does with the stages of a ring: products with `wgmma`, and their results.
//!
//! Weights are the left operand of `wgmma`. As values it takes them from shared memory; codes are decoded into registers,
//! some inputs of a step at a time, while the products of those before run.

use super::{
    Kernel,
    coded::{Coded, PANEL},
    device::{asm, asm0, at, at_const, barrier_of, element, field, number, register, vector, wide},
    epilogue::{Part, Place, Values},
    schedule::Tile,
    tile::Rows,
    wgmma::{GROUP_COLUMNS, Position, Team, part_bytes, part_rows},
};
use crate::mlir::{Builder, V};
use moec_abi::DType;
use std::ops::Range;

impl<'c> Team<'_, 'c> {
    /// Times 64 packed rows that a warpgroup has of a tile.
    fn times(&self) -> u32 {
        self.mode.columns / GROUP_COLUMNS / (self.schedule.warps / 4)
    }

    /// The multiplying warpgroup number `group`: its packed rows of all tiles.
    pub(super) fn multiply_all(&self, group: V<'c>) {
        let b = self.b;
        let pairs = self.filled_pairs();
        let all = self.times() as usize * sums(self.schedule.most_rows());
        let results = [vec!["i32"; 3], vec!["f32"; all]].concat();
        self.walk(pairs, &[b.i32(0), b.i32(0)], |rows, column_tile, carried| {
            let start = Position { stage: carried[0], parity: carried[1] };
            let end = self.choose(&self.mode.tiles, rows, &results, &|tile| self.multiply(tile, group, start));
            let sums = landed(b, &end[3..]);
            self.release(end[2]);
            self.store_group(rows, column_tile, group, &sums);
            end[..2].to_vec()
        });
    }

    /// The products of one tile. Gives the position after it, the last stage, and sums, 64 packed rows after 64; of the
    /// rows of the highest tile, of which this one may have fewer. Some of them are still on their way.
    fn multiply(&self, tile: &Tile, group: V<'c>, start: Position<'c>) -> Vec<V<'c>> {
        let b = self.b;
        let left = Left::new(self, group);
        let a = descriptor(b, b.addc(self.base(), i64::from(self.weight_bytes())));
        let units = b.i32((self.stride() / 16).cast_signed());
        let nothing = b.op("llvm.mlir.poison", &[], "f32", &[]);
        let width = sums(tile.rows);
        // There is no step before the first whose stage could be freed, and no sums: the first products set them.
        let fixed = vec![start.stage, start.parity, self.nobody()];
        let lasting = left.lasting() * self.times() as usize;
        let first = 3 + lasting;
        let carried = [fixed, vec![b.i32(0); lasting], vec![nothing; self.times() as usize * width]].concat();
        let end = b.rolled(b.i32(0), b.i32(self.steps()), b.i32(1), &carried, |step, carried| {
            let position = Position { stage: carried[0], parity: carried[1] };
            self.wait(self.full(position.stage), position.parity);
            let along = wide(b, b.muli(position.stage, units));
            let a = b.addi(a, along);
            let mut sums = carried[first..].to_vec();
            let (batch, together) = left.batch(self.times());
            let mut lasts = Vec::new();
            for time in (0..self.times()).step_by(together as usize) {
                let known = &carried[3 + lasts.len()..][..left.lasting()];
                let mut operand = left.fetch(self, position.stage, (step, along), time, known);
                let sums = &mut sums[time as usize * width..][..together as usize * width];
                for block in (0..tile.depth / 16).step_by(batch) {
                    // 16 elements are 32 bytes inside the swizzled line.
                    let blocks = (block..block + batch as u32).flat_map(|i| (0..together).map(move |time| (i, time)));
                    let blocks = blocks.map(|(i, time)| Product {
                        left: operand.block(b, i, time),
                        right: b.addc(a, i64::from(i) * 2),
                        sums: time as usize * width..(time as usize + 1) * width,
                        adds: if i == 0 { Some(step) } else { None },
                    });
                    products(b, tile, &blocks.collect::<Vec<_>>(), sums);
                    // The batch before is done now, so that the registers of its left operand may be written. With the
                    // last batch of a step, the use of the stage is over.
                    operand.pass(b, "wgmma.wait_group.sync.aligned 1;");
                    if (time, block) == (0, 0) {
                        self.release(carried[2]);
                    }
                }
                lasts.extend(operand.lasting());
            }
            let next = self.advance(position);
            [vec![next.stage, next.parity, position.stage], lasts, sums].concat()
        });
        let missing = vec![nothing; self::sums(self.schedule.most_rows()) - width];
        let sums = end[first..].chunks(width).flat_map(|sums| [sums, &missing].concat());
        end[..3].iter().copied().chain(sums).collect()
    }

    /// This warp reads a stage no more.
    fn release(&self, stage: V<'c>) {
        // `wgmma` reads for the whole warp; codes are read by each lane.
        if self.coded.is_some() {
            self.b.op0("nvvm.bar.warp.sync", &[self.b.i32(-1)], &[]);
        }
        self.arrive_empty(stage);
    }

    /// Address of the ring in shared memory (i32).
    fn base(&self) -> V<'c> {
        self.b.op("llvm.ptrtoint", &[self.shared], "i32", &[])
    }

    /// Stores the sums of a warpgroup, 64 packed rows after 64 and some rows at a time. In every lane `l` with
    /// `g = l / 4` and `t = l % 4`, sums `4j..4j + 4` are packed rows `g` (tokens `8j + 2t` and the next) and `g + 8` of
    /// the warp's sixteen.
    fn store_group(&self, rows: Rows<'c>, column_tile: V<'c>, group: V<'c>, sums: &[V<'c>]) {
        let (b, spec) = (self.b, self.spec);
        let each = super::matrices(spec);
        let (least, most) = (self.mode.tiles[0].rows, self.schedule.most_rows());
        let height = part_rows(spec, most);
        let columns = GROUP_COLUMNS / each;
        let base = at(b, self.shared, b.mulc(group, i64::from(part_bytes(spec, most))));
        let base = at_const(b, base, u64::from(self.schedule.staging(spec)));
        let tile_columns = b.mulc(column_tile, i64::from(self.mode.out_columns(spec)));
        let first_column = b.addi(tile_columns, b.mulc(group, i64::from(columns * self.times())));
        let column = b.addi(b.mulc(self.warp, i64::from(16 / each)), b.shrui(self.lane, b.i32(2)));
        let origin = [b.shli(b.andi(self.lane, b.i32(3)), b.i32(1)), column];
        // The rows of the lowest tile are a part of their own.
        let lowest = least.min(height);
        let mut ends = vec![lowest];
        ends.extend((height..=most).step_by(height as usize).filter(|end| *end > lowest));
        for (time, sums) in (0..).zip(sums.chunks(self::sums(most))) {
            let first_column = b.addc(first_column, i64::from(columns * time));
            let mut first_row = 0;
            for &end in &ends {
                let part = Part { base, first_row, rows: end - first_row, first_column, columns, swizzled: true };
                b.if_(b.cmpi("sgt", rows.count, number(b, first_row)), || {
                    self.store(rows, &part, origin, |values| {
                        let sums = &sums[self::sums(first_row)..self::sums(end)];
                        if spec.out == DType::Bf16 {
                            self.turn(&part, sums, values)
                        } else {
                            self.spread(&part, sums, values)
                        }
                    });
                    // The memory is written again.
                    self.meet();
                });
                first_row = end;
            }
        }
    }

    /// Writes bf16 results: `stmatrix` turns blocks of eight columns of eight tokens around.
    fn turn(&self, part: &Part<'c>, sums: &[V<'c>], values: &mut Values<'_, '_, 'c>) {
        let b = self.b;
        let each = super::matrices(self.spec);
        // Blocks of a warp with the same tokens.
        let beside = (2 / each) as usize;
        let blocks: Vec<_> = (0..sums.len() / 4 * beside)
            .map(|i| {
                let (j, half) = (i / beside, i % beside);
                let results = [0, 1].map(|c| {
                    let all: Vec<_> = (half..2 / beside + half).map(|h| sums[4 * j + 2 * h + c]).collect();
                    values.value((8 * j + c) as u32, 8 * half as u32, &all)
                });
                b.bitcast(b.cast("arith.truncf", vector(b, &results), "vector<2xbf16>"), "i32")
            })
            .collect();
        // Lanes 0-7 name the rows of the first block, lanes 8-15 those of the second, and so on.
        let (block, row) = (b.shrui(self.lane, b.i32(3)), b.andi(self.lane, b.i32(7)));
        let (j, half) = (b.divui(block, number(b, 2 / each)), b.remui(block, number(b, 2 / each)));
        let piece = b.addi(b.mulc(self.warp, i64::from(2 / each)), half);
        let to = part.address(b, b.addi(b.mulc(j, 8), row), b.mulc(piece, 16), 2);
        let mut first = 0;
        while first < blocks.len() {
            let count = [4, 2, 1].into_iter().find(|n| first + n <= blocks.len()).unwrap_or(1);
            let rows = 8 * (first / beside) as u32;
            let operands =
                [&[at_const(b, to, u64::from(rows * part.columns * 2))], &blocks[first..first + count]].concat();
            b.intrinsic0(&format!("llvm.nvvm.stmatrix.sync.aligned.m8n8.x{count}.trans.b16.p3"), &operands);
            first += count;
        }
    }

    /// Writes f32 results one by one.
    fn spread(&self, part: &Part<'c>, sums: &[V<'c>], values: &mut Values<'_, '_, 'c>) {
        let each = super::matrices(self.spec) as usize;
        let mut places = Vec::new();
        for (j, c) in (0..sums.len() / 4).flat_map(|j| [(j, 0), (j, 1)]) {
            let row = (8 * j + c) as u32;
            let of = [0, 1].map(|half| 4 * j + 2 * half + c);
            places.extend(of.chunks(each).zip([0, 8]).map(|(of, column)| Place {
                row,
                column,
                columns: vec![of.to_vec()],
            }));
        }
        self.write(part, &places, sums, values);
    }
}

impl Kernel<'_, '_> {
    /// The threads of a multiplying warpgroup meet.
    pub(super) fn meet_group(&self) {
        let b = self.b;
        // Barrier 0 is that of the block; warpgroup 0 copies.
        let group = b.shrui(register(b, "tid.x"), b.i32(7));
        barrier_of(b, group, 128);
    }
}

/// Sums of a lane: those of a warpgroup are 64 packed rows of so many tokens.
fn sums(rows: u32) -> usize {
    (rows / 2) as usize
}

/// The descriptor of a tile at an address in shared memory: the address in units of 16 bytes, groups of eight rows 1024
/// bytes apart, 128-byte swizzle.
fn descriptor<'c>(b: &Builder<'c>, address: V<'c>) -> V<'c> {
    b.ori(wide(b, b.shrui(address, b.i32(4))), b.i64(0x4000_0040_0001_0000))
}

/// Where the left operand of a warpgroup comes from: the first of its times 64 packed rows.
enum Left<'c> {
    /// From shared memory: its descriptor in the first stage.
    Values(V<'c>),
    /// From registers, into which codes are decoded: their place and that of their factors in the first stage, for the
    /// first of two rows of this lane that are eight apart.
    Codes { coded: Coded, codes: V<'c>, factors: Vec<V<'c>> },
}

/// The left operand of a step.
enum Operand<'c> {
    /// Its descriptor.
    Values(V<'c>),
    /// Words of codes of both rows, and the factors of both for each group of the step.
    Codes { coded: Coded, words: [Vec<V<'c>>; 2], raw: Vec<V<'c>> },
}

/// The left operand of `wgmma`: 64 rows and 16 inputs.
enum Block<'c> {
    Descriptor(V<'c>),
    Registers([V<'c>; 4]),
}

impl<'c> Left<'c> {
    fn new(team: &Team<'_, 'c>, group: V<'c>) -> Self {
        let b = team.b;
        let Some(coded) = team.coded else {
            let first = b.addi(team.base(), b.mulc(group, i64::from(team.times() * GROUP_COLUMNS) * 128));
            return Self::Values(descriptor(b, first));
        };
        let (row, t) = (b.shrui(team.lane, b.i32(2)), b.andi(team.lane, b.i32(3)));
        let panels = i64::from(team.times() * GROUP_COLUMNS / PANEL);
        let panel = b.addi(b.mulc(group, panels), b.shli(team.warp, b.i32(1)));
        let line = b.addi(b.mulc(panel, i64::from(PANEL)), row);
        let place = b.addi(b.mulc(line, i64::from(coded.line_bytes())), coded.part(b, t));
        let mut from = team.code_bytes();
        let factors = coded.sizes().map(|size| {
            let first = b.addi(b.mulc(panel, i64::from(coded.each * PANEL)), row);
            let place = at_const(b, at(b, team.shared, b.mulc(first, i64::from(size))), u64::from(from));
            from += team.factor_bytes(&coded, size);
            place
        });
        Self::Codes { coded, codes: at(b, team.shared, place), factors: factors.collect() }
    }

    /// Blocks of 16 inputs that are multiplied at a time, and of how many of so many times 64 packed rows. While some
    /// are, the next are decoded.
    const fn batch(&self, times: u32) -> (usize, u32) {
        match self {
            Self::Values(_) => (4, times),
            Self::Codes { .. } => (2, 1),
        }
    }

    /// Numbers that are carried from step to step for 64 packed rows: factors that serve more than one.
    fn lasting(&self) -> usize {
        match self {
            Self::Codes { coded, factors, .. } if coded.lasts() => 2 * factors.len(),
            Self::Values(_) | Self::Codes { .. } => 0,
        }
    }

    /// The operand of step `step`, in stage `stage`, which lies `along` units of 16 bytes after the first, from packed
    /// row `64 time` on.
    fn fetch(
        &self,
        team: &Team<'_, 'c>,
        stage: V<'c>,
        (step, along): (V<'c>, V<'c>),
        time: u32,
        lasting: &[V<'c>],
    ) -> Operand<'c> {
        let b = team.b;
        let (coded, codes, factors) = match self {
            Self::Values(first) => return Operand::Values(b.addi(*first, along)),
            Self::Codes { coded, codes, factors } => (*coded, *codes, factors),
        };
        let stage = b.mulc(stage, i64::from(team.stride()));
        let before = time * GROUP_COLUMNS;
        let t = b.andi(team.lane, b.i32(3));
        let words = [0, 1].map(|half| {
            let from = at_const(b, at(b, codes, stage), u64::from((before + half * PANEL) * coded.line_bytes()));
            let count = coded.words();
            let all = b.load(from, &format!("vector<{count}xi32>"), count * 4);
            let all: Vec<_> = (0..count as usize).map(|i| element(b, all, i, "i32")).collect();
            coded.own(b, t, &all)
        });
        let load = || {
            let mut raw = Vec::new();
            for (group, half) in (0..coded.each).flat_map(|group| [(group, 0), (group, 1)]) {
                for (of, size) in factors.iter().zip(coded.sizes()) {
                    let distance = (before * coded.each + (half * coded.each + group) * PANEL) * size;
                    let from = at_const(b, at(b, *of, stage), u64::from(distance));
                    raw.push(match size {
                        1 => b.cast("arith.extui", b.load(from, "i8", 1), "i32"),
                        _ => b.load(from, "i32", 4),
                    });
                }
            }
            raw
        };
        let raw = if coded.lasts() {
            b.if_else(coded.is_first(b, step), &vec!["i32"; lasting.len()], load, || lasting.to_vec())
        } else {
            load()
        };
        Operand::Codes { coded, words, raw }
    }
}

impl<'c> Operand<'c> {
    /// Inputs `16 i` to `16 i + 16` of the step, and packed rows from `64 time` on.
    fn block(&self, b: &Builder<'c>, i: u32, time: u32) -> Block<'c> {
        let (coded, words, raw) = match self {
            Self::Values(first) => {
                return Block::Descriptor(b.addc(*first, i64::from(time * GROUP_COLUMNS * 8 + i * 2)));
            }
            Self::Codes { coded, words, raw } => (coded, words, raw),
        };
        let kinds = coded.sizes().count();
        let factors = raw.chunks(kinds).skip(2 * coded.group_of(i)).take(2);
        let rows: Vec<_> = words.iter().zip(factors.map(|raw| coded.factor(b, raw))).collect();
        let pair = |row: usize, half: u32| coded.pair(b, rows[row].0, 2 * i + half, rows[row].1);
        Block::Registers([pair(0, 0), pair(1, 0), pair(0, 1), pair(1, 1)])
    }

    /// Assembly before which no code is decoded that is not decoded yet.
    fn pass(&mut self, b: &Builder<'c>, text: &str) {
        match self {
            Self::Values(_) => asm0(b, text, "", &[]),
            Self::Codes { words, .. } => {
                let count = words[0].len();
                let all = through(b, text, &words.concat(), "i32", &[], &[]);
                *words = [all[..count].to_vec(), all[count..].to_vec()];
            }
        }
    }

    /// What is carried on to the next step.
    fn lasting(self) -> Vec<V<'c>> {
        match self {
            Self::Codes { coded, raw, .. } if coded.lasts() => raw,
            Self::Values(_) | Self::Codes { .. } => Vec::new(),
        }
    }
}

/// A product of 64 packed rows and 16 inputs.
struct Product<'c> {
    left: Block<'c>,
    /// The descriptor of the rows.
    right: V<'c>,
    /// Its sums, of those of a batch.
    sums: Range<usize>,
    /// Whether it adds to them or sets them (i32); always adds if `None`.
    adds: Option<V<'c>>,
}

/// Adds some products. One piece of assembly holds them all: its operands are the sums, and the compiler's time goes by how
/// often so many are named.
fn products<'c>(b: &Builder<'c>, tile: &Tile, blocks: &[Product<'c>], sums: &mut [V<'c>]) {
    let (mut operands, mut kinds) = (Vec::new(), Vec::new());
    // Operands are numbered after the results and the sums.
    let mut operand = |value: V<'c>, kind: &'static str| {
        operands.push(value);
        kinds.push(kind);
        format!("${}", 2 * sums.len() + operands.len() - 1)
    };
    let mut text = String::from("{ wgmma.fence.sync.aligned;");
    if let Some(adds) = blocks.iter().find_map(|block| block.adds) {
        text += &format!(" .reg .pred add; setp.ne.b32 add, {}, 0;", operand(adds, "r"));
    }
    for block in blocks {
        let add = if block.adds.is_some() { "add" } else { "1" };
        let registers = block.sums.clone().map(|i| format!("${i}")).collect::<Vec<_>>().join(", ");
        // Both operands as they are, and both with neighbouring inputs in neighbouring places where that is not given.
        let (left, order) = match &block.left {
            Block::Descriptor(left) => (operand(*left, "l"), "1, 1, 0, 0"),
            Block::Registers(all) => {
                let all = all.map(|register| operand(register, "r"));
                (format!("{{{}}}", all.join(", ")), "1, 1, 0")
            }
        };
        let right = operand(block.right, "l");
        text += &format!(
            " wgmma.mma_async.sync.aligned.m64n{}k16.f32.bf16.bf16 {{{registers}}}, {left}, {right}, {add}, {order};",
            tile.rows,
        );
    }
    text += " wgmma.commit_group.sync.aligned; }";
    sums.copy_from_slice(&through(b, &text, sums, "f32", &operands, &kinds));
}

/// The sums when all products are done. They pass through the wait, so that no use can move before it.
fn landed<'c>(b: &Builder<'c>, sums: &[V<'c>]) -> Vec<V<'c>> {
    through(b, "wgmma.wait_group.sync.aligned 0;", sums, "f32", &[], &[])
}

/// Assembly that reads and writes values of type `ty` (f32 or i32), with operands besides.
fn through<'c>(
    b: &Builder<'c>,
    text: &str,
    values: &[V<'c>],
    ty: &str,
    operands: &[V<'c>],
    kinds: &[&str],
) -> Vec<V<'c>> {
    let each = |of: &dyn Fn(usize) -> String| (0..values.len()).map(of).collect::<Vec<_>>();
    let kinds = kinds.iter().map(|k| (*k).to_owned()).collect();
    let written = if ty == "f32" { "=f" } else { "=r" };
    let constraints = [each(&|_| written.into()), each(&|i| i.to_string()), kinds].concat().join(",");
    let result_ty = format!("!llvm.struct<({})>", each(&|_| ty.into()).join(", "));
    let result = asm(b, text, &constraints, &[values, operands].concat(), &result_ty);
    (0..values.len()).map(|i| field(b, result, i, ty)).collect()
}
