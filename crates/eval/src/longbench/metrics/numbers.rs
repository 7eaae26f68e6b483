//! Answers that are numbers.

/// Share of the numbers in the answer that are `expected`.
pub(super) fn share(answer: &str, expected: &str) -> f64 {
    let numbers: Vec<&str> = numbers(answer).collect();
    let right = numbers.iter().filter(|number| **number == expected).count();
    if numbers.is_empty() { 0.0 } else { right as f64 / numbers.len() as f64 }
}

/// Share of the numbers in the answer that are the one after `word` in the expected text.
pub(super) fn retrieval(answer: &str, expected: &str, word: &str) -> f64 {
    let paragraph = expected.match_indices(word).find_map(|(at, _)| {
        let rest = &expected[at + word.len()..];
        let end = rest.find(|c: char| !is_digit(c)).unwrap_or(rest.len());
        (end > 0).then(|| &rest[..end])
    });
    paragraph.map_or(0.0, |paragraph| share(answer, paragraph))
}

fn numbers(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !is_digit(c)).filter(|number| !number.is_empty())
}

/// Digits of full width are digits as well.
fn is_digit(c: char) -> bool {
    c.is_ascii_digit() || ('０'..='９').contains(&c)
}
