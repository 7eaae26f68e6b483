//! Similarity of lines of code: matching blocks, longest first.

use std::collections::HashMap;

/// Lines from this length on leave out characters that are common in them.
const LONG_LINE: usize = 200;

/// Similarity of the first line of the answer that is no comment and no fence, in hundredths.
pub(super) fn code(answer: &str, expected: &str) -> f64 {
    let mut lines = answer.trim_start_matches('\n').split('\n');
    let line = lines.find(|line| !line.contains(['`', '#']) && !line.contains("//")).unwrap_or("");
    if line == expected {
        return 1.0;
    }
    if line.is_empty() || expected.is_empty() {
        return 0.0;
    }
    (100.0 * ratio(line, expected)).round_ties_even() / 100.0
}

/// Twice the characters in matching blocks over the characters of both.
fn ratio(a: &str, b: &str) -> f64 {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut positions: HashMap<char, Vec<usize>> = HashMap::new();
    for (at, &c) in b.iter().enumerate() {
        positions.entry(c).or_default().push(at);
    }
    if b.len() >= LONG_LINE {
        let common = b.len() / 100 + 1;
        positions.retain(|_, at| at.len() <= common);
    }
    let mut matched = 0;
    let mut open = vec![(0, a.len(), 0, b.len())];
    while let Some((a_start, a_end, b_start, b_end)) = open.pop() {
        let (i, j, length) = longest_block(&a, &b, &positions, (a_start, a_end), (b_start, b_end));
        if length > 0 {
            matched += length;
            open.push((a_start, i, b_start, j));
            open.push((i + length, a_end, j + length, b_end));
        }
    }
    2.0 * matched as f64 / (a.len() + b.len()) as f64
}

/// The longest block that two stretches share, the earliest of equals: where it begins in each, its length.
/// Characters left out of `positions` begin no block but lengthen one.
fn longest_block(
    a: &[char],
    b: &[char],
    positions: &HashMap<char, Vec<usize>>,
    (a_start, a_end): (usize, usize),
    (b_start, b_end): (usize, usize),
) -> (usize, usize, usize) {
    let (mut i, mut j, mut length) = (a_start, b_start, 0);
    // Lengths of blocks that end at each position of b.
    let mut ending: HashMap<usize, usize> = HashMap::new();
    for (at, c) in a.iter().enumerate().take(a_end).skip(a_start) {
        let mut next = HashMap::new();
        for &other in positions.get(c).into_iter().flatten().filter(|at| (b_start..b_end).contains(*at)) {
            let before = other.checked_sub(1).and_then(|before| ending.get(&before)).copied().unwrap_or(0);
            next.insert(other, before + 1);
            if before + 1 > length {
                (i, j, length) = (at - before, other - before, before + 1);
            }
        }
        ending = next;
    }
    while i > a_start && j > b_start && a[i - 1] == b[j - 1] {
        (i, j, length) = (i - 1, j - 1, length + 1);
    }
    while i + length < a_end && j + length < b_end && a[i + length] == b[j + length] {
        length += 1;
    }
    (i, j, length)
}
