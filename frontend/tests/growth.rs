//! What reading costs grows no faster than the layers, and not with the experts: counted in allocations, which are the
//! same on every machine.

use moec_frontend::read_config;
use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
};

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: hands everything on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Allocations while a Mixtral of so many layers and experts is read.
fn reading(layers: usize, experts: usize) -> u64 {
    let text = format!(
        r#"{{"model_type": "mixtral", "torch_dtype": "bfloat16", "hidden_size": 64, "intermediate_size": 32,
        "num_hidden_layers": {layers}, "num_local_experts": {experts}, "num_experts_per_tok": 2}}"#
    );
    let before = ALLOCATIONS.get();
    let model = read_config(&text, "config.json").unwrap();
    assert_eq!((model.forms.len(), model.layers.len()), (1, layers));
    ALLOCATIONS.get() - before
}

#[test]
fn many_layers_and_experts_are_read_in_proportion() {
    let some = reading(512, 8);
    let many = reading(4096, 8);
    assert!(many <= 8 * some, "eight times the layers: {some} allocations, then {many}");
    let wide = reading(4096, 4096);
    assert!(wide <= many + many / 100, "more experts: {many} allocations, then {wide}");
}
