//! Memory budgets of the running service, and what follows from them for admission.

use std::time::Duration;

use super::{ModelInfo, Service};
use crate::error::{Error, ErrorKind};
use crate::memory::{MemoryStatus, MemoryTargets, of};

impl Service {
    /// What is held, as of the engine's last turn.
    pub fn memory(&self) -> MemoryStatus {
        self.engine.memory()
    }

    /// Fails when the model cannot be served with these budgets.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] with the least possible figure.
    pub fn check_memory(&self, targets: &MemoryTargets) -> Result<(), Error> {
        self.memory().check(targets).map_err(|(param, message)| Error::invalid(param, message))
    }

    /// Changes budgets, waits up to `patience` until they are reached, and returns what is held then: less or
    /// more than asked for where that has not sufficed. Running requests go on.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for a budget that the model cannot be served with, and nothing changes;
    /// [`ErrorKind::Internal`] when weights could not be read, with what is held; [`ErrorKind::Unavailable`] when
    /// the server is stopping.
    pub async fn set_memory(
        &self,
        targets: MemoryTargets,
        patience: Duration,
    ) -> Result<MemoryStatus, Error> {
        self.check_memory(&targets)?;
        let before = self.memory().kv;
        let pages = targets.kv.map_or(before.target_pages, |bytes| {
            usize::try_from(bytes / before.page_bytes.max(1)).unwrap_or(usize::MAX)
        });
        // Before a pool shrinks, since who is admitted meanwhile must fit, and after it has grown.
        self.model.fit(pages.min(before.target_pages));
        let change = self.engine.set_memory(targets).await;
        self.model.fit(if change.is_ok() { pages } else { before.target_pages });
        let change = change?;
        let _ = tokio::time::timeout(patience, self.engine.memory_settled(change)).await;
        let status = self.memory();
        tracing::info!(
            weights = targets.weights,
            kv = targets.kv,
            weights_held = status.weights.held,
            kv_held = status.kv.held,
            reached = status.is_reached(),
            "memory budgets changed"
        );
        match &status.weights.error {
            Some(error) if status.change == change && targets.weights.is_some() => {
                let held = of(status.weights.held);
                let message = format!("the weights could not be read to the end; {held} are held: {error}");
                Err(Error::new(ErrorKind::Internal, message))
            }
            _ => Ok(status),
        }
    }
}

impl ModelInfo {
    /// Admits no sequence that a pool of `pages` pages could not hold.
    fn fit(&self, pages: usize) {
        let pool = pages / self.dims.num_layers.max(1) * self.block_size;
        self.max_model_len.set(pool.min(self.most_model_len));
    }
}
