//! Numbers that look random. The generator is our own: the draws must never change, or sampled tests test other things.

/// A linear congruential generator, from its state.
pub struct Draw(pub u64);

impl Draw {
    /// A number below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }

    /// A place in a list of so many; 0 in an empty one.
    pub fn place(&mut self, len: usize) -> usize {
        self.below(len.max(1) as u64) as usize
    }

    /// An element of a list that is not empty.
    pub fn of<T: Clone>(&mut self, list: &[T]) -> T {
        list[self.place(list.len())].clone()
    }

    /// True one time in `n`.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}
