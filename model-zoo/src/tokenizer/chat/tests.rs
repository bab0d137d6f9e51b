use serde_json::json;

use super::*;

fn template(source: &str) -> ChatTemplate {
    ChatTemplate::new(source.into(), "<s>".into(), "</s>".into()).expect("a template")
}

fn chat(messages: serde_json::Value) -> ChatInput {
    let messages = messages.as_array().expect("an array").clone();
    ChatInput { messages, add_generation_prompt: true, ..Default::default() }
}

#[test]
fn templates_see_what_hugging_faces_do() {
    let t = template(
        "{{ bos_token }}{% for m in messages %}\n  {% if loop.first and m.role != 'system' %}\nS\n{% endif %}\n[{{ m['role'] }}] {{ m.content | trim }}{{ eos_token }}\n{% endfor %}\n{% if add_generation_prompt %}A:{% endif %}",
    );
    let out = t.render(&chat(json!([{"role": "user", "content": " hi "}]))).expect("renders");
    // As jinja2 renders it with trim_blocks and lstrip_blocks.
    assert_eq!(out, "<s>S\n[user] hi</s>\nA:");
    let t = template(
        "{{ {'a': [1, 'é<'], 'b': none} | tojson }} {{ 'x'.upper() }} {{ messages[0].content.split(',')[1] }}",
    );
    let out = t.render(&chat(json!([{"role": "user", "content": "p,q"}]))).expect("renders");
    assert_eq!(out, r#"{"a": [1, "é<"], "b": null} X q"#);
}

#[test]
fn what_a_template_refuses_is_the_clients_error() {
    let t = template("{{ raise_exception('roles must alternate') }}");
    let error = t.render(&chat(json!([]))).expect_err("raises").to_string();
    assert!(error.contains("roles must alternate"), "{error}");
}

#[test]
fn work_and_output_are_bounded() {
    let loops = template("{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}");
    let error = loops.render(&chat(json!([]))).expect_err("too much work").to_string();
    assert!(error.contains("too many steps"), "{error}");
    let long = template("{% for m in range(9000) %}{{ messages[0].content }}{% endfor %}");
    let input = chat(json!([{"role": "user", "content": "x".repeat(100_000)}]));
    let error = long.render(&input).expect_err("too long").to_string();
    assert!(error.contains("longer than"), "{error}");
}

#[test]
fn template_args_reach_the_template_but_set_nothing_of_ours() {
    let t = template("{{ thinking }}{{ messages | length }}");
    let mut input = chat(json!([{"role": "user", "content": ""}]));
    input.template_args = Map::from_iter([("thinking".to_owned(), json!("deep"))]);
    assert_eq!(t.render(&input).expect("renders"), "deep1");
    for name in RESERVED {
        input.template_args = Map::from_iter([(name.to_owned(), json!([]))]);
        assert!(t.render(&input).is_err(), "{name}");
    }
}

#[test]
fn images_go_to_templates_that_know_them_and_become_lines_for_others() {
    let shown = ChatInput {
        image_marker: Some("<i>".into()),
        ..chat(serde_json::json!([
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
            {"role": "assistant", "content": "that"},
        ]))
    };
    let render =
        |source: &str| ChatTemplate::new(source.into(), String::new(), String::new()).unwrap().render(&shown);
    let plain = render("{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}").unwrap();
    assert_eq!(plain, "user=<i>\nwhat?;assistant=that;");
    let knowing = "{% for p in messages[0].content %}{% if p.type == 'image' %}[image]{% else %}{{ p.text }}{% endif %}{% endfor %}";
    assert_eq!(render(knowing).unwrap(), "[image]what?");
}
