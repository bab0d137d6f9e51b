//! Where the bytes of pages lie: in chunks that are mapped one by one, so that a pool which shrinks gives its
//! memory back at once, and one which grows moves nothing.

use super::PageId;
use crate::Result;
use crate::memory::Region;

/// Bytes of a chunk, about: small beside any budget, large beside the cost of a mapping.
const CHUNK_BYTES: usize = 4 << 20;

/// Pages of one length, `0..num_pages`. A page becomes resident when it is first written.
#[derive(Debug)]
pub struct Pages {
    /// 16-bit words of a page.
    page_len: usize,
    /// Pages of a chunk, as a power of two: the last chunk may have fewer.
    chunk_shift: u32,
    chunks: Vec<Region>,
    num_pages: usize,
}

impl Pages {
    /// No pages yet, of `page_len` words each.
    pub(super) fn new(page_len: usize) -> Self {
        let per_chunk = (CHUNK_BYTES / (page_len * size_of::<u16>()).max(1)).max(1);
        Self { page_len, chunk_shift: per_chunk.ilog2(), chunks: Vec::new(), num_pages: 0 }
    }

    /// Pages that there are.
    pub fn num_pages(&self) -> usize {
        self.num_pages
    }

    /// The words of a page.
    ///
    /// # Panics
    /// When there is no such page.
    #[inline]
    pub fn page(&self, page: PageId) -> &[u16] {
        let (chunk, start) = self.place(page);
        &self.chunks[chunk].words()[start..start + self.page_len]
    }

    /// The words of a page, for writing.
    ///
    /// # Panics
    /// When there is no such page.
    #[inline]
    pub fn page_mut(&mut self, page: PageId) -> &mut [u16] {
        let (chunk, start) = self.place(page);
        &mut self.chunks[chunk].words_mut()[start..start + self.page_len]
    }

    /// Copies `len` words from (page, offset) to (page, offset).
    pub(super) fn copy(&mut self, from: (PageId, usize), to: (PageId, usize), len: usize) {
        let ((source, from), (target, to)) = (self.word(from), self.word(to));
        if source == target {
            return self.chunks[source].words_mut().copy_within(from..from + len, to);
        }
        if let Ok([source, target]) = self.chunks.get_disjoint_mut([source, target]) {
            target.words_mut()[to..to + len].copy_from_slice(&source.words()[from..from + len]);
        }
    }

    /// Changes the pool to pages `0..num_pages`. Pages that stay keep their content, new ones are zero, and the
    /// memory of the others is the operating system's again when this returns.
    ///
    /// # Errors
    /// [`crate::ZooError::Memory`]; the pool is as before then.
    pub(super) fn resize(&mut self, num_pages: usize) -> Result<()> {
        let per_chunk = 1 << self.chunk_shift;
        let (page_len, num_chunks) = (self.page_len, num_pages.div_ceil(per_chunk));
        let chunk_len = |index: usize| (num_pages - index * per_chunk).min(per_chunk) * page_len;
        self.chunks.truncate(num_chunks);
        // The chunk that was the last, or that is now.
        if let Some(last) = self.chunks.len().checked_sub(1)
            && self.chunks[last].words().len() != chunk_len(last)
        {
            let mut chunk = Region::zeroed(chunk_len(last) * size_of::<u16>())?;
            let kept = self.chunks[last].words();
            let kept = &kept[..kept.len().min(chunk_len(last))];
            chunk.words_mut()[..kept.len()].copy_from_slice(kept);
            self.chunks[last] = chunk;
        }
        for index in self.chunks.len()..num_chunks {
            self.chunks.push(Region::zeroed(chunk_len(index) * size_of::<u16>())?);
        }
        self.num_pages = num_pages;
        Ok(())
    }

    fn place(&self, page: PageId) -> (usize, usize) {
        let (page, mask) = (page as usize, (1 << self.chunk_shift) - 1);
        (page >> self.chunk_shift, (page & mask) * self.page_len)
    }

    fn word(&self, (page, offset): (PageId, usize)) -> (usize, usize) {
        let (chunk, start) = self.place(page);
        (chunk, start + offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Resident memory of this process in bytes.
    fn resident() -> usize {
        let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a line");
        line.trim().trim_end_matches(" kB").parse::<usize>().expect("a number") << 10
    }

    #[test]
    fn what_stays_keeps_its_content_and_what_goes_is_gone_at_once() {
        const MIB: usize = 1 << 20;
        // Of 12 KiB, as the default model's: chunks of 256 pages.
        let mut pages = Pages::new(6 << 10);
        let (all, before) = (64 * MIB / (12 << 10), resident());
        pages.resize(all).expect("memory");
        assert!(resident() - before < 8 * MIB, "untouched pages are not resident");
        (0..all as PageId).for_each(|page| pages.page_mut(page).fill(page as u16 + 1));
        assert!(resident() - before > 60 * MIB);
        for (num_pages, kept) in
            [(1000, 1000), (1001, 1000), (257, 257), (700, 257), (255, 255), (0, 0), (3, 0)]
        {
            pages.resize(num_pages).expect("memory");
            assert_eq!(pages.num_pages(), num_pages);
            for page in 0..num_pages {
                let expected = if page < kept { page as u16 + 1 } else { 0 };
                assert!(
                    pages.page(page as PageId).iter().all(|&word| word == expected),
                    "{page} of {num_pages}"
                );
            }
            // Other tests of this process allocate, too.
            let bound = num_pages * (12 << 10) + 16 * MIB;
            assert!(resident() < before + bound, "{} KiB at {num_pages}", (resident() - before) >> 10);
        }
    }
}
