//! The load generator against the real server, over both of its APIs.

use clap::Parser;
use rheostat_loadtest::run::{LoadOptions, run};
use rheostat_tests::server::TestServer;
use rheostat_tests::wire::{metric, until};

#[derive(Parser)]
struct Flags {
    #[command(flatten)]
    load: LoadOptions,
}

fn load(flags: &str) -> LoadOptions {
    let common = "test --requests 12 --prompt-tokens uniform:4-20 --output-tokens 6 --plan eco --plan auto=2";
    Flags::parse_from(common.split(' ').chain(flags.split(' '))).load
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_sent_comes_back_and_is_counted() {
    // Targets that the slowest machine meets, so that what `auto` gets does not depend on its speed.
    let server = TestServer::start(&["--target-ttft-ms", "600000", "--target-tpot-ms", "600000"]).await;
    let (http, grpc) = (format!("http://{}", server.http), format!("http://{}", server.grpc));
    let mut due = 0;
    for (url, flags) in [
        (&http, "--rate 100 --ttft-ms 60000"),
        (&http, "--concurrency 3 --no-stream --chat"),
        (&grpc, "--rate 100 --grpc"),
        (&grpc, "--concurrency 3 --grpc --no-stream"),
    ] {
        let options = load(flags);
        let report = run(url, &options, "test").await.expect(flags);
        let summary = &report.summary;
        assert_eq!((summary.requests, summary.completed), (12, 12), "{flags}: {:?}", summary.errors);
        assert_eq!(summary.tokens_per_request[1], 6.0, "{flags}");
        assert!((4.0..60.0).contains(&summary.tokens_per_request[0]), "{flags}");
        assert_eq!(summary.ttft_ms.is_some(), !options.no_stream, "{flags}");
        // A server within its targets gives `auto` the whole model.
        let eco = report.shares[0].1.requests;
        assert_eq!(summary.profiles.get("eco"), Some(&eco), "{flags}");
        assert_eq!(summary.profiles.get("dense"), Some(&(12 - eco)), "{flags}");
        assert_eq!(summary.goodput.as_ref().map(|goodput| goodput.share), options.ttft_ms.map(|_| 1.0));
        due += 12 * 6;
    }
    // The server counts a request's last token after it has sent it.
    until(async || metric(server.http, "rheostat_generation_tokens_total").await == f64::from(due)).await;
    let refused = run(&http, &load("--rate 100 --model nobody"), "test").await.expect("a report").summary;
    assert_eq!((refused.completed, refused.errors.get("refused: HTTP 404")), (0, Some(&12)));
    server.stop().await;
}
