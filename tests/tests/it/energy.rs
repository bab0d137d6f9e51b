//! Joules on the real server with the real model: they add up, and budgets hold.

use futures_util::StreamExt;
use rheostat::auth::{KeyHash, random_key};
use rheostat_tests::server::TestServer;
use rheostat_tests::wire::{raw, request, until};
use serde_json::{Value, json};

/// An answer: status, headers, body.
struct Answer {
    status: u16,
    head: String,
    body: Value,
}

/// A server whose estimate takes so much for a core that whole joules are small change, and two keys: one without
/// limits, one with few joules.
struct Metered {
    server: TestServer,
    free: String,
    limited: String,
}

impl Metered {
    async fn start() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("rheostat.toml");
        let [free, limited] = [random_key(), random_key()];
        let key = |name, key: &str, limits| {
            let hash = KeyHash::of(key.as_bytes());
            format!("[[keys]]\nname = \"{name}\"\nsha256 = \"{hash}\"\n{limits}\n")
        };
        let energy = "[energy]\nmeter = \"estimate\"\nwatts_per_core = 2000.0\nidle_watts = 300.0\n";
        let limits = "joules_per_minute = 60.0\njoules_burst = 200.0";
        let text = [energy, &key("free", &free, ""), &key("limited", &limited, limits)].concat();
        std::fs::write(&path, text).expect("written");
        let server = TestServer::start(&["--config", path.to_str().expect("a path")]).await;
        Self { server, free, limited }
    }

    async fn complete(&self, key: &str, fields: Value) -> Answer {
        let mut body =
            json!({"prompt": "Once upon a time", "max_tokens": 16, "temperature": 0, "ignore_eos": true});
        body.as_object_mut().expect("an object").extend(fields.as_object().expect("an object").clone());
        let body = body.to_string();
        let head = format!(
            "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\nauthorization: Bearer {key}\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        let answer = raw(self.server.http, format!("{head}{body}").as_bytes()).await;
        let (head, body) = answer.split_once("\r\n\r\n").expect("an answer");
        let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status");
        let body = serde_json::from_str(body).unwrap_or_else(|e| panic!("{e}: {answer}"));
        Answer { status, head: head.to_ascii_lowercase(), body }
    }

    /// Sums of the series of a counter, by whether their labels have `label`.
    async fn sum(&self, name: &str, label: &str) -> f64 {
        let (_, page) = request(self.server.http, "GET", "/metrics", b"").await;
        let lines =
            page.lines().filter(|line| line.starts_with(&format!("{name}{{")) && line.contains(label));
        lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    }
}

fn joules(answer: &Answer) -> f64 {
    assert_eq!(answer.status, 200, "{}", answer.body);
    let energy = &answer.body["usage"]["energy"];
    assert_eq!(energy["source"], "estimate", "{}", answer.body);
    energy["joules"].as_f64().expect("joules")
}

#[tokio::test(flavor = "multi_thread")]
async fn joules_add_up_and_budgets_hold() {
    let metered = Metered::start().await;
    let free = metered.free.as_str();
    // Requests of many lengths, plans and choices, at once.
    let plans = [
        json!({}),
        json!({"profile": "eco"}),
        json!({"drop": {"attention": 3}}),
        json!({"think": {"ratio": 0.4}}),
    ];
    let calls = (0..24usize).map(|i| {
        let fields = json!({
            "prompt": "A tale of the sea. ".repeat(1 + i * 5 % 17), "max_tokens": 4 + i * 7 % 30, "n": 1 + i % 2,
            "compression": plans[i % plans.len()],
        });
        let metered = &metered;
        async move { joules(&metered.complete(free, fields).await) }
    });
    let spent: Vec<f64> = futures_util::stream::iter(calls).buffer_unordered(6).collect().await;
    let requests: f64 = spent.iter().sum();
    let [prefill, decode, idle] = [
        metered.sum("rheostat_energy_joules_total", "phase=\"prefill\"").await,
        metered.sum("rheostat_energy_joules_total", "phase=\"decode\"").await,
        metered.sum("rheostat_energy_joules_total", "phase=\"idle\"").await,
    ];
    assert!(spent.iter().all(|joules| *joules > 0.0) && prefill > 0.0 && decode > 0.0 && idle > 0.0);
    let shares = [requests / (prefill + decode), {
        // The meter goes on between two looks at the page.
        let (_, page) = request(metered.server.http, "GET", "/metrics", b"").await;
        let of = |name: &str| {
            let lines = page.lines().filter(|line| line.starts_with(&format!("{name}{{")));
            lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum::<f64>()
        };
        of("rheostat_energy_joules_total") / of("rheostat_energy_metered_joules_total")
    }];
    assert!(shares.iter().all(|share| (share - 1.0).abs() < 0.02), "{shares:?}, {requests} J");

    // A request with two fifths of what it costs ends within that, with what it has.
    let long = json!({"max_tokens": 60});
    let whole = joules(&metered.complete(free, long.clone()).await);
    let limited = metered.complete(free, json!({"max_tokens": 60, "max_joules": 0.4 * whole})).await;
    let choice = &limited.body["choices"][0];
    assert_eq!((&choice["finish_reason"], &choice["stop_reason"]), (&json!("length"), &json!("max_joules")));
    let tokens = limited.body["usage"]["completion_tokens"].as_u64().expect("a count");
    assert!(
        (1..60).contains(&tokens) && !choice["text"].as_str().expect("a text").is_empty(),
        "{}",
        limited.body
    );
    // CPU time of this process is that of other tests, too: what a step costs varies.
    assert!(joules(&limited) < whole, "{} of {whole}", joules(&limited));
    let late = metered.complete(free, json!({"max_tokens": 1500, "deadline": 0.2})).await;
    let choice = &late.body["choices"][0];
    assert_eq!((&choice["finish_reason"], &choice["stop_reason"]), (&json!("length"), &json!("deadline")));
    for wrong in [json!({"max_joules": 0}), json!({"deadline": -1.5})] {
        let name = wrong.as_object().expect("an object").keys().next().expect("a name").clone();
        let refused = metered.complete(free, wrong).await;
        assert_eq!(
            (refused.status, &refused.body["error"]["param"]),
            (400, &json!(name)),
            "{}",
            refused.body
        );
    }

    // A key that is over its joules is told when to come back, and others are not.
    let refused = async || metered.complete(&metered.limited, json!({})).await;
    until(async || refused().await.status == 429).await;
    let refused = refused().await;
    assert!(refused.status == 429 && refused.body.to_string().contains("joules"), "{}", refused.body);
    let after =
        refused.head.split("retry-after: ").nth(1).and_then(|rest| rest.split("\r\n").next()?.parse().ok());
    assert!(after.is_some_and(|seconds: u32| seconds > 1), "{}", refused.head);
    assert_eq!(metered.complete(free, json!({})).await.status, 200);
    assert!(metered.sum("rheostat_key_energy_joules_total", "key=\"limited\"").await > 0.0);
    metered.server.stop().await;
}
