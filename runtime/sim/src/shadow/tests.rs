//! Accesses of a few threads, and what is said to them.

use super::cell::More;
use super::*;
use crate::clock::{Clock, Memo, Scope, Sync, Touch, View};
use std::rc::Rc;

fn access(view: &View, me: u32, touch: Touch) -> Access<'_> {
    // Views change between accesses of a test: nothing may be remembered.
    let memo = Box::leak(Box::default());
    Access {
        memo,
        view,
        peers: None,
        cluster: 0,
        me,
        warp: me & !31,
        block_size: 64,
        independent: false,
        waited: &[],
        touch,
        agent: 140,
        agent_time: 1,
        pc: me,
    }
}

fn views() -> Vec<View> {
    let empty = Rc::new(Clock::default());
    (0..64).map(|_| View::new(&empty, 64)).collect()
}

fn barrier(views: &mut [View]) {
    let mut s = Sync::default();
    for (i, v) in views.iter_mut().enumerate() {
        v.release_into(i as u32, &mut s);
    }
    let (v, p) = s.share();
    let mut memo = Memo::default();
    for w in views {
        View::acquire(std::iter::once(w), &mut memo, &v, &p);
    }
}

#[test]
fn unordered_read_after_write_races_and_a_barrier_orders_it() {
    let mut views = views();
    let mut s = Shadow::new(16);
    assert_eq!(s.touch(0, 15, true, &|| false, &access(&views[0], 0, Touch::Plain)), None);
    assert_eq!(s.touch(0, 15, false, &|| false, &access(&views[1], 1, Touch::Plain)), Some(Conflict::Race { with: 0 }));
    barrier(&mut views);
    assert_eq!(s.touch(0, 15, false, &|| false, &access(&views[2], 2, Touch::Plain)), None);
}

#[test]
fn write_after_reads_of_many_threads_races_with_the_unordered_one() {
    let mut views = views();
    let mut s = Shadow::new(16);
    for (i, view) in (0..).zip(&views) {
        assert_eq!(s.touch(1, 15, false, &|| false, &access(view, i, Touch::Plain)), None);
    }
    assert!(s.touch(1, 15, true, &|| false, &access(&views[0], 0, Touch::Plain)).is_some());
    for (i, view) in (0..).zip(&views) {
        s.touch(2, 15, false, &|| false, &access(view, i, Touch::Plain));
    }
    barrier(&mut views);
    assert_eq!(s.touch(2, 15, true, &|| false, &access(&views[0], 0, Touch::Plain)), None);
}

#[test]
fn readers_of_two_clusters_stand_for_all() {
    let mut views = views();
    let mut s = Shadow::new(16);
    for cluster in [0, 1, 1, 2] {
        let a = Access { cluster, independent: true, ..access(&views[0], 0, Touch::Plain) };
        assert_eq!(s.touch_line(0, false, &|| false, &a), None);
    }
    assert_eq!((s.lines[0].more, s.lists.all.len()), (More::CROWD, 0));
    barrier(&mut views);
    for cluster in [0, 3] {
        let mut s = Shadow { lines: s.lines.clone(), ..Shadow::default() };
        let a = Access { cluster, independent: true, ..access(&views[0], 0, Touch::Plain) };
        assert_eq!(s.touch(1, 15, true, &|| false, &a), Some(Conflict::Race { with: 0 }));
        assert_eq!(s.touch(1, 15, true, &|| false, &a), None);
    }
}

#[test]
fn neighbouring_bytes_do_not_race() {
    let views = views();
    let mut s = Shadow::new(16);
    for (i, view) in (0..).zip(&views[..4]) {
        assert_eq!(s.touch(0, 1 << i, true, &|| false, &access(view, i, Touch::Plain)), None);
    }
    assert!(s.touch(0, 1, true, &|| false, &access(&views[5], 5, Touch::Plain)).is_some());
}

#[test]
fn lines_part_and_join_again() {
    let mut views = views();
    let mut s = Shadow::new(32);
    assert_eq!(s.touch_line(1, true, &|| false, &access(&views[0], 0, Touch::Plain)), None);
    // The line's write is each word's, and a word's reader is not the line's.
    assert!(s.touch(6, 15, false, &|| false, &access(&views[1], 1, Touch::Plain)).is_some());
    barrier(&mut views);
    assert_eq!(s.touch(6, 1, true, &|| false, &access(&views[2], 2, Touch::Plain)), None);
    assert_eq!(s.touch(5, 15, true, &|| false, &access(&views[3], 3, Touch::Plain)), None);
    assert_eq!(s.touch(6, 2, true, &|| false, &access(&views[4], 4, Touch::Plain)), None);
    let all = s.touch_line(1, false, &|| false, &access(&views[3], 3, Touch::Plain));
    assert_eq!(all, Some(Conflict::Race { with: 4 }));
    barrier(&mut views);
    assert_eq!(s.touch_line(1, true, &|| false, &access(&views[5], 5, Touch::Plain)), None);
    assert!(s.lines.iter().all(|c| c.more.parts().is_none()));
    assert_eq!(
        s.touch_line(1, false, &|| false, &access(&views[6], 6, Touch::Plain)),
        Some(Conflict::Race { with: 5 })
    );
}

#[test]
fn atomics_do_not_race_inside_their_scope() {
    let views = views();
    let mut s = Shadow::new(16);
    let strong = Touch::Strong(Scope::Gpu);
    assert_eq!(s.touch(0, 15, true, &|| false, &access(&views[0], 0, strong)), None);
    assert_eq!(s.touch(0, 15, true, &|| false, &access(&views[1], 1, strong)), None);
    assert!(s.touch(0, 15, false, &|| false, &access(&views[2], 2, Touch::Plain)).is_some());
}

#[test]
fn async_proxy_needs_a_fence_that_precedes_the_barrier_or_follows_it() {
    let mut views = views();
    let mut s = Shadow::new(16);
    let mut memo = Memo::default();
    s.touch(0, 15, true, &|| false, &access(&views[3], 3, Touch::Plain));
    s.touch(1, 15, true, &|| false, &access(&views[4], 4, Touch::Plain));
    views[4].proxy_fence(&mut memo);
    barrier(&mut views);
    assert_eq!(
        s.touch(0, 15, false, &|| false, &access(&views[0], 0, Touch::Bulk)),
        Some(Conflict::MissingFence { with: 3 })
    );
    assert_eq!(s.touch(1, 15, false, &|| false, &access(&views[0], 0, Touch::Bulk)), None);
    views[1].proxy_fence(&mut memo);
    assert_eq!(s.touch(0, 15, false, &|| false, &access(&views[1], 1, Touch::Bulk)), None);
}

#[test]
fn data_of_a_copy_in_flight_is_a_missing_wait() {
    let mut views = views();
    let mut s = Shadow::new(16);
    s.touch(0, 15, true, &|| false, &access(&views[0], 0, Touch::Bulk));
    barrier(&mut views);
    assert_eq!(
        s.touch(0, 15, false, &|| false, &access(&views[1], 1, Touch::Plain)),
        Some(Conflict::MissingWait { with: 0, waited: false })
    );
    let mut done = Clock::default();
    done.raise(140, 1);
    views[1].v = Memo::default().join(&views[1].v.clone(), &Rc::new(done));
    assert_eq!(s.touch(0, 15, false, &|| false, &access(&views[1], 1, Touch::Plain)), None);
}
