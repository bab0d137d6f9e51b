//! API keys and TLS as clients that others wrote meet them.

use std::path::Path;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rheostat::auth::{KeyHash, random_key};
use rheostat_tests::python::run_client;
use rheostat_tests::server::TestServer;

/// Writes an authority's `ca.pem`, and `server.pem` and `server.key` for this machine.
fn certificates(dir: &Path) {
    let mut params = CertificateParams::new(Vec::new()).expect("no names");
    // Another name than the server's: OpenSSL takes a certificate that names itself for its own issuer.
    params.distinguished_name.push(rcgen::DnType::CommonName, "test authority");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign];
    let key = KeyPair::generate().expect("a key");
    let authority = CertifiedIssuer::self_signed(params, key).expect("signed");
    let key = KeyPair::generate().expect("a key");
    let mut params = CertificateParams::new(["localhost", "127.0.0.1"].map(String::from)).expect("names");
    params.use_authority_key_identifier_extension = true;
    let certificate = params.signed_by(&key, &authority).expect("signed");
    for (name, text) in
        [("ca.pem", authority.pem()), ("server.pem", certificate.pem()), ("server.key", key.serialize_pem())]
    {
        std::fs::write(dir.join(name), text).expect("written");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_with_keys_are_served_over_tls_and_others_are_not() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name).to_str().expect("a path").to_owned();
    certificates(folder.path());
    let keys = ["free", "limited", "operator"].map(|name| (name, random_key()));
    let sections = keys.each_ref().map(|(name, key)| {
        let limits = match *name {
            "limited" => "tokens_per_minute = 6\ntokens_burst = 60\nmax_concurrent_requests = 1\n",
            "operator" => "admin = true\n",
            _ => "",
        };
        format!("[[keys]]\nname = \"{name}\"\nsha256 = \"{}\"\n{limits}", KeyHash::of(key.as_bytes()))
    });
    std::fs::write(path("rheostat.toml"), sections.concat()).expect("written");
    let (config, cert, key) = (path("rheostat.toml"), path("server.pem"), path("server.key"));
    let server = TestServer::start(&["--config", &config, "--tls-cert", &cert, "--tls-key", &key]).await;
    let base_url = format!("https://localhost:{}", server.http.port());
    let grpc = format!("localhost:{}", server.grpc.port());
    let ca = path("ca.pem");
    tokio::task::spawn_blocking(move || {
        let [free, limited, operator] = keys.map(|(_, key)| key);
        run_client(
            "security_client.py",
            &[
                "--base-url",
                &base_url,
                "--grpc",
                &grpc,
                "--ca",
                &ca,
                "--free",
                &free,
                "--limited",
                &limited,
                "--operator",
                &operator,
            ],
        );
    })
    .await
    .expect("every check holds");
    server.stop().await;
}
