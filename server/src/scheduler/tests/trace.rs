//! Text traces. A trace is a list of commands, each followed by what it must print:
//!
//! ```text
//! add A x10 max=4
//! step
//! => A[0..8] | used 2 cached 0 free 14
//! ```
//! * `add A x10 max=4`: prompt of the first 10 tokens of text x. `x8y2` goes on with text y, `@B` is what B
//!   has now. Also `group=G salt=N plan=N bypass`.
//! * `step`: schedule, forward, commit. Prints the rows, `*` where one samples, `-A` where A was preempted,
//!   and the pages after the commit. `plan` and `commit` are its halves; `fail` does not commit.
//! * `stop A`: A ends with its next token. `demote A`, `abort A`, `resize N`, `stats`, `run` (steps to the end), `run N` (at most N).

use std::sync::Arc;

use model_zoo::compression::{KvDemand, PlanKey};

use super::simulation::Simulation;
use crate::scheduler::{SchedulerConfig, SeqId, SequenceSpec, StepPlan};

/// Runs `trace` on a scheduler made as `config` says (`batched=8 seqs=4 pages=16 block=4 layers=1
/// cache=1`, these being the defaults) and compares what it prints.
#[track_caller]
pub(super) fn check(config: &str, trace: &str) {
    let mut runner = Runner::new(config);
    let mut actual = Vec::new();
    let expected: Vec<&str> = trace.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    for command in expected.iter().filter(|line| !line.starts_with("=>")) {
        actual.push((*command).to_owned());
        actual.extend(runner.run(command).map(|printed| format!("=> {printed}")));
    }
    assert!(actual == expected, "the trace is\n{}\n", actual.join("\n"));
}

struct Runner {
    simulation: Simulation,
    names: Vec<String>,
    num_layers: usize,
    plan: StepPlan,
}

impl Runner {
    fn new(config: &str) -> Self {
        let get = |key, default| number(config, key).unwrap_or(default);
        let num_layers = get("layers", 1);
        let config = SchedulerConfig {
            max_num_batched_tokens: get("batched", 8),
            max_num_seqs: get("seqs", 4),
            block_size: get("block", 4),
            num_pages: get("pages", 16),
            prefix_caching: get("cache", 1) == 1,
        };
        Self { simulation: Simulation::new(config), names: Vec::new(), num_layers, plan: StepPlan::default() }
    }

    fn run(&mut self, command: &str) -> Option<String> {
        let mut words = command.split_whitespace();
        let (verb, argument) = (words.next()?, words.next().unwrap_or_default());
        match verb {
            "add" => return self.add(command),
            "stop" => {
                let id = self.id(argument);
                self.simulation.finishing.insert(id);
                return None;
            }
            "demote" => {
                let id = self.id(argument);
                self.simulation.demote(id);
                return None;
            }
            "abort" => {
                let id = self.id(argument);
                self.simulation.abort(id);
                return Some(self.pages());
            }
            "resize" => {
                let now = self.simulation.resize(argument.parse().expect("a number of pages"));
                return Some(format!("{now} pages | {}", self.pages()));
            }
            "stats" => return Some(self.stats()),
            "commit" => {
                self.simulation.commit(&self.plan);
                return Some(self.pages());
            }
            "run" => {
                let limit = argument.parse().unwrap_or(usize::MAX);
                let mut num_steps = 0;
                while self.simulation.scheduler.has_work() && num_steps < limit {
                    self.simulation.step();
                    num_steps += 1;
                }
                return Some(format!("{num_steps} steps | {}", self.pages()));
            }
            _ => {}
        }
        self.plan = self.simulation.schedule();
        match verb {
            "step" => {
                self.simulation.forward(&self.plan);
                self.simulation.commit(&self.plan);
            }
            "fail" => self.simulation.fail(&self.plan),
            "plan" => self.simulation.forward(&self.plan),
            _ => panic!("{verb} is no command"),
        }
        Some(format!("{} | {}", self.rows(), self.pages()))
    }

    fn add(&mut self, command: &str) -> Option<String> {
        let mut words = command.split_whitespace().skip(1);
        let name = words.next().expect("a name");
        let prompt = self.prompt(words.next().expect("a prompt"));
        let group = word(command, "group").unwrap_or(name);
        let spec = SequenceSpec {
            id: self.id(name),
            group: group.bytes().fold(0, |hash, byte| hash * 256 + u64::from(byte)),
            prompt,
            images: Arc::default(),
            max_tokens: number(command, "max").unwrap_or(1),
            demand: KvDemand::dense(self.num_layers),
            plan_key: PlanKey(number(command, "plan").unwrap_or(0) as u64),
            cache_salt: number(command, "salt").unwrap_or(0) as u64,
            bypass_prefix_cache: command.contains("bypass"),
        };
        self.simulation.add(spec).err().map(|e| e.to_string())
    }

    fn prompt(&mut self, text: &str) -> Arc<[u32]> {
        let Some(name) = text.strip_prefix('@') else { return text_tokens(text) };
        let id = self.id(name);
        self.simulation.scheduler.tokens(id).expect("a live sequence").into()
    }

    fn id(&mut self, name: &str) -> SeqId {
        let known = self.names.iter().position(|known| known == name);
        SeqId(known.unwrap_or_else(|| {
            self.names.push(name.to_owned());
            self.names.len() - 1
        }) as u64)
    }

    fn name(&self, id: SeqId) -> &str {
        &self.names[id.0 as usize]
    }

    fn rows(&self) -> String {
        let mut shown: Vec<String> = Vec::new();
        for row in &self.plan.rows {
            let (end, mark) = (row.first_pos + row.num_tokens, if row.samples { "*" } else { "" });
            shown.push(format!("{}[{}..{end}]{mark}", self.name(row.id), row.first_pos));
        }
        for &id in &self.plan.preempted {
            shown.push(format!("-{}", self.name(id)));
        }
        if shown.is_empty() { "nothing".to_owned() } else { shown.join(" ") }
    }

    fn pages(&self) -> String {
        let stats = self.simulation.scheduler.stats();
        format!("used {} cached {} free {}", stats.pages_used, stats.pages_cached, stats.pages_free)
    }

    fn stats(&self) -> String {
        let stats = self.simulation.scheduler.stats();
        format!(
            "running {} waiting {} hits {}/{} preemptions {}",
            stats.running,
            stats.waiting,
            stats.prefix_hit_tokens,
            stats.prefix_query_tokens,
            stats.preemptions
        )
    }
}

/// The prompt that a text such as `x8y2` stands for: texts are named by a letter and do not repeat.
fn text_tokens(text: &str) -> Arc<[u32]> {
    let mut prompt = Vec::new();
    for part in text.split_inclusive(char::is_alphabetic).collect::<Vec<_>>().windows(2) {
        let name = part[0].chars().last().map_or(0, u32::from);
        let len: u32 = part[1].trim_end_matches(char::is_alphabetic).parse().expect("a number of tokens");
        prompt.extend((0..len).map(|i| name * 1000 + i));
    }
    prompt.into()
}

fn word<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.split_whitespace().find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
}

fn number(text: &str, key: &str) -> Option<usize> {
    word(text, key)?.parse().ok()
}
