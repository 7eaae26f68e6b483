use super::*;

fn close(found: f64, expected: f64) {
    assert!((found - expected).abs() < 1e-6, "found {found}, expected {expected}");
}

fn score(metric: Metric, answer: &str, expected: &str) -> f64 {
    metric.score(answer, expected, &[])
}

#[test]
fn f1_counts_words_without_articles_and_punctuation() {
    let f1 = |answer, expected| score(Metric::F1, answer, expected);
    close(f1("The Eiffel Tower.", "eiffel tower"), 1.0);
    // "cat sat on mat" and "cat on mat": 3 in common, precision 3/4, recall 1.
    close(f1("The cat sat on the mat", "a cat on a mat"), 6.0 / 7.0);
    // A word counts as often as both have it: "b b c" and "b d" have one b in common.
    close(f1("b b c", "b d"), 0.4);
    close(f1("another theory", "the theory"), 2.0 / 3.0);
    close(f1("don't", "dont"), 1.0);
    close(f1("", "x"), 0.0);
    close(f1("the", "the"), 0.0);
}

#[test]
fn f1_of_chinese_counts_its_words() {
    let f1 = |answer, expected| score(Metric::F1Chinese, answer, expected);
    close(f1("北京大学", "北京大学。"), 1.0);
    // 我 来到 北京 清华大学, and 清华大学 在 北京: two in common of 4 and 3.
    close(f1("我来到北京清华大学", "清华大学在北京"), 4.0 / 7.0);
    // Case and full-width punctuation do not count, but for what the published list leaves out.
    close(f1("「ABC」！", "abc"), 1.0);
    close(f1("《ABC》", "abc"), 2.0 / 3.0);
    // GPT, 4 and 发布 of the first, GPT of the second.
    close(f1("GPT-4发布", "GPT"), 0.5);
    close(f1("。", "北京"), 0.0);
}

#[test]
fn rouge_l_counts_distinct_words_in_order() {
    let rouge = |answer, expected| score(Metric::RougeL, answer, expected);
    close(rouge("the cat sat on the mat", "the cat sat on the mat"), 1.0);
    // Distinct words: the cat was found under bed; the cat was under bed. All five are in order: precision 5/6.
    close(rouge("the cat was found under the bed", "the cat was under the bed"), 10.0 / 11.0);
    // Only one of the two can be in order.
    close(rouge("b a", "a b"), 0.5);
    // Each sentence is matched apart: "a b" and "c d" both ways round.
    close(rouge("c d. a b.", "a b. c d."), 1.0);
    close(rouge("", "a"), 0.0);
    close(rouge("a", "..."), 0.0);
    // A sentence of white space is an empty word: "a" and "" against "a".
    close(rouge("a. \n", "a"), 2.0 / 3.0);
}

#[test]
fn rouge_l_of_chinese_counts_its_words() {
    let rouge = |answer, expected| score(Metric::RougeLChinese, answer, expected);
    close(rouge("我来到北京清华大学", "我来到北京清华大学"), 1.0);
    // 我 来到 北京 清华大学, and 我 在 清华大学: 我 and 清华大学 in order, of 4 and 3.
    close(rouge("我来到北京清华大学", "我在清华大学"), 4.0 / 7.0);
}

#[test]
fn a_class_counts_for_less_beside_others() {
    let classes = ["Individual", "Group", "Description of a person", "Description"].map(String::from);
    let score = |answer, expected| Metric::Classification.score(answer, expected, &classes);
    close(score("Type: Group", "Group"), 1.0);
    close(score("Group or Individual", "Group"), 0.5);
    close(score("Individual", "Group"), 0.0);
    // The name of one class is a part of another's.
    close(score("Description of a person", "Description of a person"), 1.0);
    close(score("Description of a person", "Description"), 0.5);
    close(score("新闻类别：体育", "体育"), 0.0);
    let chinese = ["体育", "财经"].map(String::from);
    close(Metric::Classification.score("类别：体育", "体育", &chinese), 1.0);
}

#[test]
fn removing_a_class_passes_over_the_next() {
    // "a" is removed, which passes over "ab"; "abc" is what was asked for.
    let classes = ["a", "ab", "abc"].map(String::from);
    close(Metric::Classification.score("abc", "abc", &classes), 0.5);
}

#[test]
fn numbers_are_right_or_wrong() {
    close(score(Metric::Retrieval, "Paragraph 7", "Paragraph 7"), 1.0);
    close(score(Metric::Retrieval, "7 or 12", "Paragraph 7"), 0.5);
    close(score(Metric::Retrieval, "Paragraph 17", "Paragraph 7"), 0.0);
    close(score(Metric::Retrieval, "none", "Paragraph 7"), 0.0);
    close(score(Metric::RetrievalChinese, "段落3", "段落3"), 1.0);
    close(score(Metric::RetrievalChinese, "段落3和段落５，3", "段落3"), 2.0 / 3.0);
    close(score(Metric::Count, "There are 5, of 9", "5"), 0.5);
    close(score(Metric::Count, "five", "5"), 0.0);
}

#[test]
fn code_is_compared_by_its_first_line() {
    let code = |answer: &str, expected: &str| score(Metric::Code, answer, expected);
    close(code("\n# comment\nreturn x\nmore", "return x"), 1.0);
    // "abcd" and "bcde" share "bcd": 2 * 3 / 8.
    close(code("abcd", "bcde"), 0.75);
    // "private" is shared apart from what stands between: "qabxcd" and "abycdf" share "ab" and "cd", 8/12.
    close(code("qabxcd", "abycdf"), 0.67);
    close(code("```", "x"), 0.0);
    close(code("abc", "xyz"), 0.0);
    // 200 characters and more leave out common ones: an "a" begins no block, but lengthens that of "x".
    let long = format!("{}x{}", "a".repeat(150), "a".repeat(60));
    close(code(&"a".repeat(211), &long), 0.71);
    close(code("ax", &long), 0.02);
}
