//! Two small tasks with one right answer: short questions, and a needle in a long text.
//!
//! They see what perplexity hides. A small model fails many of them dense; what counts is the difference.

/// A prompt and the text that its completion must contain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// What the model completes.
    pub prompt: String,
    /// What must come first in it, letters of either case.
    pub answer: String,
}

impl Question {
    /// Whether `completion` begins with the answer.
    pub fn is_answered_by(&self, completion: &str) -> bool {
        completion.trim_start().to_lowercase().starts_with(&self.answer.to_lowercase())
    }
}

const EXAMPLES: &str = "Q: What is the capital of Norway?\nA: Oslo\n\nQ: What is the opposite of \"cold\"?\nA: hot\n\nQ: How many legs does a dog have?\nA: four\n\n";

const QUESTIONS: [(&str, &str); 40] = [
    ("What is the capital of France?", "Paris"),
    ("What is the capital of Japan?", "Tokyo"),
    ("What is the capital of Italy?", "Rome"),
    ("What is the capital of Germany?", "Berlin"),
    ("What is the capital of Spain?", "Madrid"),
    ("What is the capital of Russia?", "Moscow"),
    ("What is the capital of China?", "Beijing"),
    ("What is the capital of Egypt?", "Cairo"),
    ("What is the capital of Greece?", "Athens"),
    ("What is the capital of Canada?", "Ottawa"),
    ("What is the capital of England?", "London"),
    ("What is the capital of Austria?", "Vienna"),
    ("What is the capital of Portugal?", "Lisbon"),
    ("What is the capital of Ireland?", "Dublin"),
    ("What is the opposite of \"up\"?", "down"),
    ("What is the opposite of \"big\"?", "small"),
    ("What is the opposite of \"day\"?", "night"),
    ("What is the opposite of \"old\"?", "young"),
    ("What is the opposite of \"left\"?", "right"),
    ("What is the opposite of \"open\"?", "closed"),
    ("What is the opposite of \"black\"?", "white"),
    ("What is the opposite of \"happy\"?", "sad"),
    ("How many days are in a week?", "seven"),
    ("How many months are in a year?", "twelve"),
    ("How many wheels does a bicycle have?", "two"),
    ("How many legs does a spider have?", "eight"),
    ("How many sides does a triangle have?", "three"),
    ("What color is the sky on a clear day?", "blue"),
    ("What color is grass?", "green"),
    ("What color is snow?", "white"),
    ("What color is a ripe banana?", "yellow"),
    ("What planet do we live on?", "Earth"),
    ("Which planet is known as the Red Planet?", "Mars"),
    ("Which is the largest planet of the solar system?", "Jupiter"),
    ("What is frozen water called?", "ice"),
    ("What do bees make?", "honey"),
    ("What gas do plants take in from the air?", "carbon dioxide"),
    ("Who wrote Romeo and Juliet?", "William Shakespeare"),
    ("What language is spoken in Brazil?", "Portuguese"),
    ("In which continent is Kenya?", "Africa"),
];

/// The short questions, each after three answered ones.
pub fn short_questions() -> Vec<Question> {
    let question = |(question, answer): (&str, &str)| Question {
        prompt: format!("{EXAMPLES}Q: {question}\nA:"),
        answer: answer.to_owned(),
    };
    QUESTIONS.into_iter().map(question).collect()
}

/// Needles at `depths` (shares of the text before it) in about `words` words of `text`, one a depth.
pub fn needles(text: &str, words: usize, depths: &[f64]) -> Vec<Question> {
    const CITIES: [&str; 5] = ["Lisbon", "Nairobi", "Osaka", "Quito", "Tbilisi"];
    let all: Vec<&str> = text.split_whitespace().collect();
    let needle = |(index, &depth): (usize, &f64)| {
        // A new stretch of the text for each.
        let start = (index * words).min(all.len().saturating_sub(words));
        let stretch = &all[start..(start + words).min(all.len())];
        let (before, after) = stretch.split_at((depth * stretch.len() as f64) as usize);
        let city = CITIES[index % CITIES.len()];
        let code = 10_007 + 7_919 * index % 89_989;
        let prompt = format!(
            "{} The secret code of {city} is {code}. {}\n\nThe secret code of {city} is",
            before.join(" "),
            after.join(" ")
        );
        Question { prompt, answer: code.to_string() }
    };
    depths.iter().enumerate().map(needle).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_needle_lies_at_its_depth_and_is_asked_for_at_the_end() {
        let text = (0..500).map(|i| format!("w{i}")).collect::<Vec<_>>().join(" ");
        for needle in needles(&text, 100, &[0.0, 0.5, 0.9]) {
            let fact = needle.prompt.find(&needle.answer).expect("the needle is there");
            assert!(needle.prompt.ends_with(" is") && fact < needle.prompt.len() - 40);
            assert!(needle.is_answered_by(&format!(" {}.", needle.answer)));
        }
        assert!(short_questions()[0].is_answered_by(" paris, of course"));
        assert!(!short_questions()[0].is_answered_by(" not Paris"));
    }
}
