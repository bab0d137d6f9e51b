//! Which places on the network an image may come from: those that the operator names, and of them only what
//! everybody can reach. A request must not make the server speak to its own neighbours (SSRF).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use url::{Host, Url};

use super::fetch::FetchError;

/// Whether everybody can reach `ip`: no loopback, private, link-local (with the clouds' metadata services),
/// shared, reserved or multicast address, in whatever form IPv6 carries it.
pub(super) fn is_public(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => is_public_v4(ip),
        IpAddr::V6(ip) => is_public_v6(ip),
    }
}

fn is_public_v4(ip: Ipv4Addr) -> bool {
    let [a, b, c, _] = ip.octets();
    let is_special = matches!(
        (a, b, c),
        (0 | 10 | 127 | 224..=255, ..)
            | (100, 64..=127, _)
            | (169, 254, _)
            | (172, 16..=31, _)
            | (192, 168, _)
            | (198, 18..=19, _)
            | (192, 0, 0 | 2)
            | (192, 88, 99)
            | (198, 51, 100)
            | (203, 0, 113)
    );
    !is_special
}

fn is_public_v6(ip: Ipv6Addr) -> bool {
    if let Some(v4) = ip.to_ipv4_mapped() {
        return is_public_v4(v4);
    }
    let [a, b, c, d, e, f, g, h] = ip.segments();
    let embedded = |high: u16, low: u16| {
        let ([a, b], [c, d]) = (high.to_be_bytes(), low.to_be_bytes());
        is_public_v4(Ipv4Addr::new(a, b, c, d))
    };
    match (a, b) {
        // NAT64 and 6to4 carry an IPv4 address that a gateway would send to.
        (0x64, 0xff9b) => [c, d, e, f] == [0; 4] && embedded(g, h),
        (0x2002, _) => embedded(b, c),
        // Teredo, benchmarking, ORCHID, documentation.
        (0x2001, 0..=0x1ff | 0xdb8) | (0x3fff, _) => false,
        // Global unicast.
        _ => (0x2000..=0x3fff).contains(&a),
    }
}

/// Where a URL points, once it may be fetched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Target {
    /// Whether it is `https`.
    pub(super) tls: bool,
    /// Name or address, as it is resolved.
    pub(super) host: String,
    /// Port.
    pub(super) port: u16,
}

/// Checks a URL against the schemes and hosts that are allowed.
///
/// # Errors
/// [`FetchError::Refused`].
pub(super) fn check(url: &Url, allowed: &[String]) -> Result<Target, FetchError> {
    let refuse = |what: String| Err(FetchError::Refused(what));
    let tls = match url.scheme() {
        "http" => false,
        "https" => true,
        other => return refuse(format!("{other}: URLs are not fetched; send https:, http: or data:")),
    };
    if !url.username().is_empty() || url.password().is_some() {
        return refuse("URLs with a user name or password are not fetched".into());
    }
    let host = match url.host() {
        Some(Host::Domain(name)) => name.trim_end_matches('.').to_ascii_lowercase(),
        Some(Host::Ipv4(ip)) => ip.to_string(),
        Some(Host::Ipv6(ip)) => ip.to_string(),
        None => return refuse("the URL has no host".into()),
    };
    let Some(port) = url.port_or_known_default() else { return refuse("the URL has no port".into()) };
    let is_default = port == if tls { 443 } else { 80 };
    if !allowed.iter().any(|entry| allows(entry, (&host, port, is_default))) {
        return refuse(format!("{host}:{port} is not among the hosts that images are fetched from"));
    }
    Ok(Target { tls, host, port })
}

/// Whether an entry of the list (`host`, `host:port`, `*.domain`, `*`) allows a host. Without a port it allows
/// the scheme's own.
fn allows(entry: &str, (host, port, is_default): (&str, u16, bool)) -> bool {
    let entry = entry.trim().to_ascii_lowercase();
    let with_port = entry.rsplit_once(':').and_then(|(name, port)| Some((name, port.parse::<u16>().ok()?)));
    let (name, port_fits) = match with_port {
        // An IPv6 address has colons of its own, and no port then.
        Some((name, wanted)) if !name.contains(':') || name.ends_with(']') => (name, wanted == port),
        _ => (entry.as_str(), is_default),
    };
    let name = name.trim_start_matches('[').trim_end_matches(']');
    let name_fits = match name.strip_prefix('*') {
        Some("") => true,
        Some(suffix) => suffix.starts_with('.') && host.ends_with(suffix) && host.len() > suffix.len(),
        None => name == host,
    };
    name_fits && port_fits
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_everybody_can_reach_is_public() {
        for public in
            ["1.1.1.1", "93.184.216.34", "172.32.0.1", "100.128.0.1", "2606:4700::1111", "64:ff9b::101:101"]
        {
            assert!(is_public(public.parse().unwrap()), "{public}");
        }
        for private in [
            "127.0.0.1",
            "127.255.255.254",
            "0.0.0.0",
            "10.1.2.3",
            "172.16.0.1",
            "172.31.255.255",
            "192.168.1.1",
            "169.254.169.254",
            "100.64.0.1",
            "192.0.0.1",
            "198.18.0.1",
            "224.0.0.1",
            "240.0.0.1",
            "255.255.255.255",
            "::1",
            "::",
            "fe80::1",
            "fc00::1",
            "fd12::1",
            "fec0::1",
            "ff02::1",
            "::ffff:127.0.0.1",
            "::ffff:10.0.0.1",
            "::ffff:169.254.169.254",
            "::127.0.0.1",
            "64:ff9b::7f00:1",
            "64:ff9b:1::1",
            "2002:7f00:1::",
            "2002:c0a8:101::1",
            "2001:0:1::1",
            "2001:db8::1",
            "fd00:ec2::254",
        ] {
            assert!(!is_public(private.parse().unwrap()), "{private}");
        }
    }

    #[test]
    fn hosts_and_schemes_are_as_the_operator_says() {
        let allowed = ["images.example".to_owned(), "*.cdn.example".into(), "other.example:8443".into()];
        let ok = |url: &str| check(&Url::parse(url).unwrap(), &allowed).is_ok();
        for fine in [
            "https://images.example/a.png",
            "http://images.example/",
            "https://IMAGES.example./x",
            "https://a.cdn.example/x",
            "https://a.b.cdn.example/x",
            "https://other.example:8443/x",
        ] {
            assert!(ok(fine), "{fine}");
        }
        for bad in [
            "https://images.example:8443/",
            "https://images.example.evil.example/",
            "https://evil.example/images.example",
            "https://cdn.example/",
            "https://evilcdn.example/",
            "https://other.example/",
            "ftp://images.example/x",
            "file:///etc/passwd",
            "gopher://images.example/",
            "https://images.example@evil.example/",
            "https://user:pass@images.example/",
            "http://127.0.0.1/",
            "http://0x7f.1/",
            "http://2130706433/",
            "http://[::1]/",
        ] {
            assert!(!ok(bad), "{bad}");
        }
        let any = ["*".to_owned()];
        assert!(
            check(&Url::parse("http://0x7f.1/").unwrap(), &any)
                .is_ok_and(|target| target.host == "127.0.0.1")
        );
        assert!(check(&Url::parse("http://any.example:81/").unwrap(), &any).is_err());
    }
}
