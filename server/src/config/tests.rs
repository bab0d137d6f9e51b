use clap::Parser;

use super::*;

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    options: Options,
}

fn flags(args: &[&str]) -> Options {
    Cli::try_parse_from(std::iter::once(&"rheostat").chain(args)).expect("flags parse").options
}

#[test]
fn flags_win_over_the_file_and_the_file_over_defaults() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(
        file.path(),
        "[http]\naddress = \"0.0.0.0:9\"\nmax_body = \"1KiB\"\n[memory]\nkv = 4096\n",
    )
    .expect("written");
    let path = file.path().to_str().expect("a path");
    let config = Config::resolve(flags(&["--config", path, "--http", "127.0.0.1:7"])).expect("valid");
    assert_eq!(config.http.address.to_string(), "127.0.0.1:7");
    assert_eq!(config.http.max_body, 1024);
    assert_eq!(config.engine.kv_bytes, 4096);
    assert_eq!(config.grpc.to_string(), "127.0.0.1:50051");
    assert_eq!(config.model, "smollm2-135m");
}

/// A key's section.
fn key(name: &str, more: &str) -> String {
    format!("[[keys]]\nname = \"{name}\"\nsha256 = \"{}\"\n{more}\n", "ab".repeat(32))
}

#[test]
fn mistakes_are_named() {
    for (toml, expected) in [
        ("[http]\nadress = \"x\"", "unknown field `adress`, expected one of `address`"),
        ("[memory]\nkv = \"12 potatoes\"", "is not a size"),
        ("[engine]\nblock_size = 17", "multiple of 16"),
        ("[engine]\nthreads = 0", "nonzero"),
        ("[limits]\nmax_n = 0", "limits.max_n must be at least 1"),
        ("[targets]\nttft_ms = 0.0", "targets.ttft_ms is 0; it must be a number above 0"),
        ("[energy]\nwatts_per_core = -1.0", "energy.watts_per_core is -1; it must be a number 0 or more"),
        ("[energy]\nmeter = \"solar\"", "unknown variant `solar`"),
        ("[profiles.auto]\ndrop = { attention = 1 }", "profiles.auto"),
        ("[grpc]\naddress = \"127.0.0.1:8080\"", "must differ"),
        ("[server]\nmodel = \"\"", "model is empty"),
        ("[tls]\ncert = \"c.pem\"", "tls needs both cert and key"),
        ("[[keys]]\nname = \"a\"\nsha256 = \"abc\"", "64 hexadecimal digits"),
        ("[telemetry]\notlp_endpoint = \"collector:4317\"", "http://HOST:PORT"),
        ("[telemetry]\nsample_ratio = 1.5", "between 0 and 1"),
        (&key("a b", ""), "letters, digits"),
        (&key("a", "tokens_burst = 5"), "tokens_burst of \"a\" needs tokens_per_minute"),
        (&key("a", "joules_per_minute = 0"), "above 0"),
        (&key("a", "max_concurrent_requests = 0"), "at least 1"),
        (&key("a", "tokens = 5"), "unknown field `tokens`"),
        (&(key("a", "") + &key("a", "")), "two keys have the name"),
        (&(key("a", "") + &key("b", "")), "sha256 of another key"),
        ("nonsense", "expected"),
    ] {
        let error = match Options::from_toml(toml) {
            Err(error) => error,
            Ok(options) => Config::validate(options).expect_err(toml).to_string(),
        };
        assert!(error.contains(expected), "{toml}: {error}");
    }
}

#[test]
fn sizes_are_read_as_people_write_them() {
    for (text, bytes) in
        [("512MiB", 512 << 20), ("1.5 GiB", 3 << 29), ("90MB", 90_000_000), ("7", 7), ("2g", 2 << 30)]
    {
        assert_eq!(text.parse::<ByteSize>().map(ByteSize::bytes), Ok(bytes));
    }
    for text in ["", "MiB", "-1", "1e3", "5 apples"] {
        assert!(text.parse::<ByteSize>().is_err(), "{text}");
    }
}

/// The example lists every key with its default: what it says must be what holds without it.
#[test]
fn the_example_file_is_valid_and_says_the_defaults() {
    let example = include_str!("../../../deploy/rheostat.toml");
    let uncommented: String = example
        .lines()
        .map(|line| {
            line.strip_prefix("# ")
                .filter(|rest| rest.contains(" = ") && !rest.ends_with('.'))
                .unwrap_or(line)
        })
        .map(|line| format!("{line}\n"))
        .collect();
    let config = Config::validate(Options::from_toml(&uncommented).expect("parses")).expect("valid");
    let defaults = Config::validate(Options::default()).expect("valid");
    assert_eq!(config.http.max_body, defaults.http.max_body);
    assert_eq!(config.http.address, defaults.http.address);
    assert_eq!(config.limits, defaults.limits);
    assert_eq!(config.engine.max_num_batched_tokens, defaults.engine.max_num_batched_tokens);
    assert_eq!(config.governor, defaults.governor);
    assert_eq!((config.energy, config.verbosity), (defaults.energy, defaults.verbosity));
    assert_eq!((config.drain, config.model), (defaults.drain, defaults.model));
}

/// What deploy/ offers to start from starts.
#[test]
fn deployed_configurations_are_valid() {
    for (name, text) in [
        ("small-cpu", include_str!("../../../deploy/examples/small-cpu.toml")),
        ("production", include_str!("../../../deploy/examples/production.toml")),
        ("compose", include_str!("../../../deploy/compose/rheostat.toml")),
        ("kubernetes", include_str!("../../../deploy/kubernetes/base/rheostat.toml")),
    ] {
        let options = Options::from_toml(text).unwrap_or_else(|e| panic!("{name}: {e}"));
        Config::validate(options).unwrap_or_else(|e| panic!("{name}: {e}"));
    }
}
