//! Who is admitted next: preempted sequences, then the requests in turn.

use std::collections::VecDeque;

use super::SeqId;

/// The queue. Its candidates, in order, are every preempted sequence and the first sequence of every
/// request; a request whose sequence was admitted goes to the end with the rest of its choices.
#[derive(Debug, Default)]
pub(super) struct WaitingQueue {
    preempted: VecDeque<SeqId>,
    groups: VecDeque<Group>,
    len: usize,
}

#[derive(Debug)]
struct Group {
    id: u64,
    seqs: VecDeque<SeqId>,
}

impl WaitingQueue {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Appends a sequence behind those of its group, and a new group behind the other groups.
    pub(super) fn push(&mut self, group: u64, id: SeqId) {
        self.len += 1;
        // The choices of a request arrive together, so its group is mostly the last one.
        match self.groups.iter_mut().rfind(|g| g.id == group) {
            Some(found) => found.seqs.push_back(id),
            None => self.groups.push_back(Group { id: group, seqs: VecDeque::from([id]) }),
        }
    }

    /// Puts a preempted sequence at the head.
    pub(super) fn push_preempted(&mut self, id: SeqId) {
        self.len += 1;
        self.preempted.push_front(id);
    }

    /// The candidate that comes after `index` others.
    pub(super) fn candidate(&self, index: usize) -> Option<SeqId> {
        match self.preempted.get(index) {
            Some(&id) => Some(id),
            None => self.groups.get(index - self.preempted.len())?.seqs.front().copied(),
        }
    }

    /// Removes the candidate at `index`, which is admitted; its group goes to the end.
    pub(super) fn admit(&mut self, index: usize) {
        if self.preempted.remove(index).is_some() {
            self.len -= 1;
        } else if let Some(mut group) = self.groups.remove(index - self.preempted.len()) {
            self.len -= 1;
            group.seqs.pop_front();
            if !group.seqs.is_empty() {
                self.groups.push_back(group);
            }
        }
    }

    /// Removes a sequence wherever it is.
    pub(super) fn remove(&mut self, id: SeqId) {
        self.preempted.retain(|&waiting| waiting != id);
        for group in &mut self.groups {
            group.seqs.retain(|&waiting| waiting != id);
        }
        self.groups.retain(|group| !group.seqs.is_empty());
        self.len = self.preempted.len() + self.groups.iter().map(|group| group.seqs.len()).sum::<usize>();
    }
}
