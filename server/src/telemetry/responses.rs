//! Responses of the front ends, by labels that only a response tells. Their counters are registered once and then
//! looked up: registering takes the registry's locks and allocates the labels, on every response.

use std::collections::HashMap;
use std::sync::{PoisonError, RwLock};

use metrics::Counter;
use tonic::Code;

use super::instruments::{Definition, Paired};
use super::{Metrics, label, plain};

pub(super) const HTTP_REQUESTS: Definition =
    plain("rheostat_http_requests_total", "", "HTTP responses by route, method and status");
pub(super) const GRPC_REQUESTS: Definition =
    plain("rheostat_grpc_requests_total", "", "gRPC responses by method and code");

/// The counters that have been registered.
#[derive(Debug, Default)]
pub(super) struct Responses {
    /// By route, then by method and status.
    http: Known<(&'static str, u16)>,
    /// By method, then by code.
    grpc: Known<Code>,
}

/// Counters by the rest of their labels, of which a name has few.
type Counters<K> = Vec<(K, Paired<Counter>)>;

/// Counters by a name of a fixed set.
#[derive(Debug)]
struct Known<K>(RwLock<HashMap<String, Counters<K>>>);

impl<K> Default for Known<K> {
    fn default() -> Self {
        Self(RwLock::default())
    }
}

impl<K: Copy + PartialEq> Known<K> {
    /// Adds one to the counter of these labels, which `register` makes when it is asked for first.
    fn count(&self, name: &str, rest: K, register: impl FnOnce() -> Paired<Counter>) {
        let has_rest = |(known, _): &&(K, Paired<Counter>)| *known == rest;
        {
            let known = self.0.read().unwrap_or_else(PoisonError::into_inner);
            if let Some((_, counter)) = known.get(name).and_then(|known| known.iter().find(has_rest)) {
                return counter.add(1);
            }
        }
        let mut known = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let known = known.entry(name.to_owned()).or_default();
        // Another response may have come first; the registry would give both the same counter.
        let counter = register();
        counter.add(1);
        if known.iter().all(|(known, _)| *known != rest) {
            known.push((rest, counter));
        }
    }
}

impl Metrics {
    /// An HTTP response was sent. `route` and `method` must come from fixed sets, not from the client.
    pub fn http_request(&self, route: &str, method: &'static str, status: u16) {
        self.responses.http.count(route, (method, status), || {
            let labels =
                [label("route", route), label("method", method), label("status", status.to_string())];
            self.instruments.counter(&HTTP_REQUESTS, labels.concat(), Vec::new())
        });
    }

    /// A gRPC response was sent. `method` must come from a fixed set, not from the client.
    pub fn grpc_request(&self, method: &str, code: Code) {
        self.responses.grpc.count(method, code, || {
            let labels = [label("method", method), label("code", format!("{code:?}"))].concat();
            self.instruments.counter(&GRPC_REQUESTS, labels, Vec::new())
        });
    }
}
