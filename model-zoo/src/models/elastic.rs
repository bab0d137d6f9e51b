//! Weights that can be held in part, and whose part can change between steps.

use crate::Result;

/// Weights whose compressed form is one **stack** of blocks in order of importance over a base that is always
/// held: every prefix of the stack is a valid model, and more blocks are never worse (BitStack).
///
/// A count of blocks names one exact set of weights. A row is served with the first [`blocks`] of the stack, its
/// own count, which is at most what is held; rows of different counts share a step.
///
/// [`blocks`]: crate::compression::RowState::blocks
pub trait ElasticWeights {
    /// Blocks of the whole stack.
    fn num_blocks(&self) -> usize;

    /// Blocks held now.
    fn held(&self) -> usize;

    /// Bytes of all weights, the base included, while the first `blocks` of the stack are held.
    fn bytes_of(&self, blocks: usize) -> u64;

    /// Levels of the matrix that has most, when the whole stack is held.
    fn num_levels(&self) -> usize;

    /// The longest prefix of the stack in which no matrix has more than `levels` levels: what a request for
    /// `levels` is served with, where it is held.
    fn blocks_of_levels(&self, levels: usize) -> usize;

    /// Levels of a matrix on average, weighed by bytes, when the first `blocks` of the stack are used.
    fn mean_levels(&self, blocks: usize) -> f64;

    /// Reads the next block of the stack, checks it, and holds it. Between steps only.
    ///
    /// # Errors
    /// The block cannot be read, or is not what its checksum says. What was held is held still, unchanged.
    fn grow(&mut self) -> Result<()>;

    /// Frees the last block held, its memory at once. Nothing happens where only the base is held.
    /// Between steps only, and when no row needs it any more.
    fn shrink(&mut self);

    /// Of a sequence whose first `prompt_len` tokens were given and not sampled: how many tokens from the start have
    /// K and V that follow from the tokens, the plan and the blocks alone, and so may be shared. Weights that are
    /// applied to sampled tokens in another way than to prompts say so here.
    fn shareable_len(&self, _prompt_len: usize) -> usize {
        usize::MAX
    }

    /// The most blocks whose weights fit `bytes`, or `None` when not even the base does.
    fn blocks_within(&self, bytes: u64) -> Option<usize> {
        let fits = |blocks: &usize| self.bytes_of(*blocks) <= bytes;
        // Bytes grow with blocks: the first that does not fit ends the prefix.
        let (mut low, mut high) = (0, self.num_blocks() + 1);
        while low < high {
            let middle = low.midpoint(high);
            if middle <= self.num_blocks() && fits(&middle) { low = middle + 1 } else { high = middle }
        }
        low.checked_sub(1)
    }
}
