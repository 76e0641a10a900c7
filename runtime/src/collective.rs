//! The ranks of a layer as they talk to each other: one primitive, of which all moves are made.

use crate::error::{Code, Result, RuntimeError};
use moec_abi::Group;
use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Condvar, Mutex, PoisonError},
};

/// A way to other ranks. A network needs no more than this.
pub trait Collectives: Sync {
    /// Hands `send[i]` to member `i` of the group and waits for what each member has for this rank, in their order.
    /// All members call it in the same order.
    ///
    /// # Errors
    /// A member is gone.
    fn all_to_all(&self, group: &Group, send: Vec<Vec<u8>>) -> Result<Vec<Vec<u8>>>;
}

/// Mail that is under way, by sender, receiver and group.
#[derive(Default)]
struct Post {
    mail: BTreeMap<(u64, u64, String), VecDeque<Vec<u8>>>,
    closed: bool,
}

/// Ranks that are threads of one process, with mail in memory.
#[derive(Clone, Default)]
pub struct Threads {
    post: Arc<(Mutex<Post>, Condvar)>,
}

impl Threads {
    /// A way between threads; clones reach the same ranks.
    pub fn new() -> Self {
        Self::default()
    }

    /// Ends all waiting with an error: a rank has failed.
    pub fn close(&self) {
        self.post.0.lock().unwrap_or_else(PoisonError::into_inner).closed = true;
        self.post.1.notify_all();
    }
}

impl Collectives for Threads {
    fn all_to_all(&self, group: &Group, send: Vec<Vec<u8>>) -> Result<Vec<Vec<u8>>> {
        let own = usize::try_from(group.at).ok().and_then(|at| group.ranks.get(at)).copied();
        let (Some(own), true) = (own, send.len() == group.ranks.len()) else {
            let message = format!("{} parts for the {} ranks of group {}", send.len(), group.ranks.len(), group.name);
            return Err(RuntimeError::new(Code::Artefact, message));
        };
        let (lock, arrived) = &*self.post;
        let mut post = lock.lock().unwrap_or_else(PoisonError::into_inner);
        for (to, bytes) in group.ranks.iter().zip(send) {
            post.mail.entry((own, *to, group.name.clone())).or_default().push_back(bytes);
        }
        arrived.notify_all();
        let mut received = Vec::with_capacity(group.ranks.len());
        for from in &group.ranks {
            let key = (*from, own, group.name.clone());
            received.push(loop {
                if let Some(bytes) = post.mail.get_mut(&key).and_then(VecDeque::pop_front) {
                    break bytes;
                }
                if post.closed {
                    return Err(RuntimeError::new(Code::Device, format!("rank {from} has failed")));
                }
                post = arrived.wait(post).unwrap_or_else(PoisonError::into_inner);
            });
        }
        Ok(received)
    }
}
