//! Who may ask, and how much: API keys, their limits, and what is charged to them.
//!
//! A front end shows what a client sent to the [`KeyRing`] and passes the [`Client`] on with the request;
//! admission takes a [`Place`] and a [`Charge`] from it; the engine says what was used. Without keys in the
//! configuration everybody may ask everything.

mod account;
mod bucket;
mod hash;
#[cfg(test)]
mod tests;

pub use account::{Charge, KeyLimits, Place};
pub use bucket::Rate;
pub use hash::{KeyHash, random_key};

use std::sync::{Arc, PoisonError, RwLock};

use account::Account;

use crate::error::{Error, ErrorKind};
use crate::telemetry::Metrics;

/// A key as the configuration has it.
#[derive(Debug, Clone, PartialEq)]
pub struct KeyConfig {
    /// What logs and metrics call its clients.
    pub name: String,
    /// What its key hashes to.
    pub hash: KeyHash,
    /// It may use the operators' endpoints.
    pub admin: bool,
    /// What its clients may use.
    pub limits: KeyLimits,
}

/// What an endpoint asks of its caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Nothing: probes.
    Open,
    /// A key.
    Client,
    /// A key of an operator.
    Admin,
}

/// The client that a key belongs to. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Client {
    name: Arc<str>,
    admin: bool,
    account: Arc<Account>,
}

impl Client {
    /// The key's name in the configuration.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether it may use the operators' endpoints.
    pub fn is_admin(&self) -> bool {
        self.admin
    }

    /// Takes one of its places for requests that run at once.
    ///
    /// # Errors
    /// [`ErrorKind::RateLimited`] when all are taken.
    pub fn enter(&self) -> Result<Place, Error> {
        self.account.enter()
    }

    /// Takes what a request of at most `tokens` tokens, prompt and output, can cost out of its buckets.
    ///
    /// # Errors
    /// [`ErrorKind::RateLimited`], with the time after which it fits.
    pub fn charge(&self, tokens: usize) -> Result<Charge, Error> {
        self.account.charge(tokens)
    }
}

struct Key {
    hash: KeyHash,
    client: Client,
}

/// The keys of a server. They can be replaced while it runs.
pub struct KeyRing {
    keys: RwLock<Arc<[Key]>>,
    metrics: Arc<Metrics>,
}

impl std::fmt::Debug for KeyRing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KeyRing").finish_non_exhaustive()
    }
}

impl KeyRing {
    /// A ring of `keys`, whose accounts begin now. Without any, everybody may ask.
    pub fn new(keys: &[KeyConfig], metrics: Arc<Metrics>) -> Self {
        let ring = Self { keys: RwLock::new(Arc::new([])), metrics };
        ring.replace(keys);
        ring
    }

    /// Takes other keys from now on. One of a name that was there keeps its account: what it has running
    /// and what is left in its buckets. Requests under way go on, whatever became of their key.
    pub fn replace(&self, keys: &[KeyConfig]) {
        let before = self.current();
        let account = |config: &KeyConfig| {
            let known = before.iter().find(|key| *key.client.name == *config.name);
            match known.map(|key| Arc::clone(&key.client.account)) {
                Some(account) => {
                    account.set_limits(&config.limits);
                    account
                }
                None => Arc::new(Account::new(&config.limits, self.metrics.key(&config.name))),
            }
        };
        let keys: Arc<[Key]> = keys
            .iter()
            .map(|config| {
                let account = account(config);
                let client = Client { name: config.name.as_str().into(), admin: config.admin, account };
                Key { hash: config.hash, client }
            })
            .collect();
        *self.keys.write().unwrap_or_else(PoisonError::into_inner) = keys;
    }

    /// The client of a call whose `Authorization` header (or metadata) is `authorization`, or `None` where
    /// nobody is asked who they are.
    ///
    /// # Errors
    /// [`ErrorKind::Unauthenticated`] without a known key, [`ErrorKind::Forbidden`] when a client's key is
    /// used where an operator's is needed.
    pub fn authorize(&self, access: Access, authorization: Option<&[u8]>) -> Result<Option<Client>, Error> {
        let keys = self.current();
        if access == Access::Open || keys.is_empty() {
            return Ok(None);
        }
        let client = identify(&keys, authorization).inspect_err(|_| self.metrics.unauthenticated())?;
        if access == Access::Admin && !client.admin {
            let message = "this API key may not use the operators' endpoints; use one with admin = true";
            return Err(Error::new(ErrorKind::Forbidden, message));
        }
        Ok(Some(client))
    }

    fn current(&self) -> Arc<[Key]> {
        Arc::clone(&self.keys.read().unwrap_or_else(PoisonError::into_inner))
    }
}

fn identify(keys: &[Key], authorization: Option<&[u8]>) -> Result<Client, Error> {
    let fail = |message: &str| Error::new(ErrorKind::Unauthenticated, message);
    let Some(value) = authorization else {
        return Err(fail("this server needs an API key: send it as `Authorization: Bearer KEY`"));
    };
    let key = match value.split_at_checked(7) {
        Some((scheme, key)) if scheme.eq_ignore_ascii_case(b"bearer ") => key.trim_ascii(),
        _ => return Err(fail("the Authorization header must be `Bearer` and an API key")),
    };
    let hash = KeyHash::of(key);
    // Every key is looked at, so that the time says nothing about which one came close.
    let mut found = None;
    for known in keys {
        if bool::from(known.hash.matches(&hash)) {
            found = Some(&known.client);
        }
    }
    found
        .cloned()
        .ok_or_else(|| fail("this API key is not known to the server; check it, or ask its operator"))
}
