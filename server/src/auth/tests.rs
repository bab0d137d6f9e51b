use super::*;
use crate::telemetry::{MetricsCompat, ServedModel};

fn key(name: &str, limits: KeyLimits) -> KeyConfig {
    KeyConfig { name: name.into(), hash: KeyHash::of(name.as_bytes()), admin: name == "operator", limits }
}

fn ring(keys: &[KeyConfig]) -> KeyRing {
    KeyRing::new(keys, Arc::new(Metrics::new(&ServedModel::default(), MetricsCompat::None)))
}

/// The client of the key that is spelled like its name.
fn client(ring: &KeyRing, name: &str) -> Client {
    let header = format!("Bearer {name}");
    ring.authorize(Access::Client, Some(header.as_bytes())).expect("known").expect("asked for")
}

/// A rate so slow that a test's time adds nothing to speak of.
fn slow(burst: f64) -> Option<Rate> {
    Some(Rate { per_minute: 0.06, burst })
}

fn refusal<T: std::fmt::Debug>(result: Result<T, Error>) -> (u32, String) {
    let error = result.expect_err("it is over its limit");
    match error.kind {
        ErrorKind::RateLimited { retry_after_s } => (retry_after_s, error.message),
        kind => panic!("{kind:?}: {error}"),
    }
}

#[test]
fn only_the_right_key_opens() {
    let ring = ring(&[key("alice", KeyLimits::default()), key("operator", KeyLimits::default())]);
    let kind = |access, header: Option<&str>| {
        ring.authorize(access, header.map(str::as_bytes))
            .map(|client| client.map(|c| c.name().to_owned()))
            .map_err(|e| e.kind)
    };
    for wrong in [None, Some(""), Some("Bearer"), Some("Bearer "), Some("Bearer alic"), Some("Bearer alice2")]
    {
        assert_eq!(kind(Access::Client, wrong), Err(ErrorKind::Unauthenticated), "{wrong:?}");
        assert_eq!(kind(Access::Admin, wrong), Err(ErrorKind::Unauthenticated), "{wrong:?}");
        assert_eq!(kind(Access::Open, wrong), Ok(None), "{wrong:?}");
    }
    for wrong in ["alice", "Basic alice", "Bearer=alice", "Bear\u{e9}r alice"] {
        assert_eq!(kind(Access::Client, Some(wrong)), Err(ErrorKind::Unauthenticated), "{wrong:?}");
    }
    // The hash in the configuration is not a key.
    let hash = format!("Bearer {}", KeyHash::of(b"alice"));
    assert_eq!(kind(Access::Client, Some(&hash)), Err(ErrorKind::Unauthenticated));
    for right in ["Bearer alice", "bearer alice", "BEARER  alice "] {
        assert_eq!(kind(Access::Client, Some(right)), Ok(Some("alice".into())), "{right:?}");
    }
    assert_eq!(kind(Access::Admin, Some("Bearer alice")), Err(ErrorKind::Forbidden));
    assert_eq!(kind(Access::Admin, Some("Bearer operator")), Ok(Some("operator".into())));
    let text = ring.metrics.render();
    assert!(text.contains("rheostat_unauthenticated_requests_total 17"), "{text}");
}

#[test]
fn without_keys_everybody_may_ask() {
    for access in [Access::Open, Access::Client, Access::Admin] {
        assert!(ring(&[]).authorize(access, None).expect("open").is_none());
    }
}

#[test]
fn a_key_over_its_bucket_is_refused_and_others_are_not() {
    let tokens = KeyLimits { tokens: slow(100.0), ..KeyLimits::default() };
    let ring = ring(&[key("alice", tokens), key("bob", tokens)]);
    let (alice, bob) = (client(&ring, "alice"), client(&ring, "bob"));
    let running = alice.charge(90).expect("it fits");
    let (wait, message) = refusal(alice.charge(20));
    // Ten tokens at one a thousand seconds.
    assert!((9_990..=10_000).contains(&wait), "{wait}");
    assert!(message.contains(&format!("{wait} s")), "{message}");
    drop(bob.charge(90).expect("bob's bucket is his own"));
    // What the request did not use comes back when it ends.
    running.add_tokens(30);
    drop(running);
    drop(alice.charge(70).expect("70 are left"));
    // More than the burst needs a full bucket …
    refusal(alice.charge(1000));
    let whole = bob.charge(1000).expect("bob's is full");
    whole.add_tokens(150);
    drop(whole);
    // … and leaves a debt.
    let (wait, _) = refusal(bob.charge(1));
    assert!((50_900..=51_000).contains(&wait), "{wait}");
    let text = ring.metrics.render();
    for line in [
        r#"rheostat_key_requests_refused_total{key="alice",limit="tokens"} 2"#,
        r#"rheostat_key_requests_admitted_total{key="alice"} 2"#,
        r#"rheostat_key_tokens_total{key="bob"} 150"#,
    ] {
        assert!(text.lines().any(|shown| shown == line), "{line} is not in\n{text}");
    }
}

#[test]
fn joules_are_taken_at_the_rate_that_the_key_has_shown() {
    let limits = KeyLimits { joules: slow(100.0), tokens: slow(1e6), ..KeyLimits::default() };
    let ring = ring(&[key("alice", limits)]);
    let alice = client(&ring, "alice");
    // Nothing is known before the first request has ended: it is taken for free.
    let first = alice.charge(10_000).expect("the bucket is full");
    first.add_tokens(100);
    first.add_joules(20.0);
    drop(first);
    // 0.2 J a token: 80 J are left, which is 400 tokens.
    drop(alice.charge(390).expect("it fits"));
    let running = alice.charge(300).expect("it fits");
    let (_, message) = refusal(alice.charge(200));
    assert!(message.contains("joules"), "{message}");
    // The refused request took no tokens either.
    drop(running);
    let text = ring.metrics.render();
    assert!(text.contains(r#"rheostat_key_energy_joules_total{key="alice"} 20"#), "{text}");
}

#[test]
fn places_are_free_again_when_they_are_dropped() {
    let limits = KeyLimits { max_concurrent_requests: Some(2), ..KeyLimits::default() };
    let ring = ring(&[key("alice", limits), key("bob", limits)]);
    let (alice, bob) = (client(&ring, "alice"), client(&ring, "bob"));
    let places = [alice.enter().expect("one"), alice.enter().expect("two")];
    assert!(refusal(alice.enter()).1.contains('2'));
    assert!(bob.enter().is_ok());
    drop(places);
    assert!(alice.enter().is_ok());
}

#[test]
fn replaced_keys_keep_their_accounts_and_removed_ones_are_not_known() {
    let limited = |burst| KeyLimits { tokens: slow(burst), ..KeyLimits::default() };
    let ring = ring(&[key("alice", limited(100.0)), key("bob", limited(100.0))]);
    let alice = client(&ring, "alice");
    let charge = alice.charge(80).expect("it fits");
    // Alice's secret changes, bob's key goes, carol's comes.
    let rotated = KeyConfig { hash: KeyHash::of(b"alice-2"), ..key("alice", limited(1000.0)) };
    ring.replace(&[rotated, key("carol", KeyLimits::default())]);
    for gone in [b"Bearer alice".as_slice(), b"Bearer bob"] {
        let error = ring.authorize(Access::Client, Some(gone)).expect_err("it is gone");
        assert_eq!(error.kind, ErrorKind::Unauthenticated);
    }
    client(&ring, "carol");
    let alice = client(&ring, "alice-2");
    assert_eq!(alice.name(), "alice");
    refusal(alice.charge(30));
    drop(charge);
    assert!(alice.charge(100).is_ok(), "the old request settled into the same account");
}

#[test]
fn keys_are_random_and_hashes_are_read_as_they_are_written() {
    let (one, two) = (random_key(), random_key());
    assert!(one.starts_with("rheo-") && one.len() == 69 && one != two, "{one} {two}");
    let hash = KeyHash::of(b"abc");
    // FIPS 180's example.
    let written = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
    assert_eq!(hash.to_string(), written);
    let read: KeyHash = written.to_uppercase().parse().expect("hexadecimal");
    assert!(bool::from(read.matches(&hash)));
    assert!(!format!("{hash:?}").contains("ba78"));
    for wrong in ["", "ba78", &written[1..], &written.replace('b', "g"), &"é".repeat(32)] {
        assert!(wrong.parse::<KeyHash>().is_err(), "{wrong}");
    }
}
