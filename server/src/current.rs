//! A value that an operator can replace while requests read it.

use std::sync::{Arc, PoisonError, RwLock};

/// The current value of something that can change on the running server. Clones see the same value.
#[derive(Debug, Clone)]
pub struct Current<T>(Arc<RwLock<Arc<T>>>);

impl<T> Current<T> {
    /// `value`, until it is replaced.
    pub fn new(value: T) -> Self {
        Self(Arc::new(RwLock::new(Arc::new(value))))
    }

    /// The value now. Ask once a request: it may be another one a moment later.
    pub fn get(&self) -> Arc<T> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Replaces the value for all who ask from now on.
    pub fn set(&self, value: T) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(value);
    }
}

impl<T> From<T> for Current<T> {
    fn from(value: T) -> Self {
        Self::new(value)
    }
}
