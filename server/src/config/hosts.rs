//! Lists of hosts as people write them.

use std::convert::Infallible;
use std::str::FromStr;

/// Hosts, written as a list in the file and separated by commas elsewhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostList(Vec<String>);

impl HostList {
    /// The hosts.
    pub fn into_hosts(self) -> Vec<String> {
        self.0
    }
}

impl FromStr for HostList {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        let hosts = text.split(',').map(str::trim).filter(|host| !host.is_empty());
        Ok(Self(hosts.map(str::to_owned).collect()))
    }
}

impl<'de> serde::Deserialize<'de> for HostList {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Vec::deserialize(deserializer).map(Self)
    }
}
