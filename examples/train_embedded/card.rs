//! The model card: what the model is, how it was made, what it can and cannot do.

use std::fmt::Write;

use sample_attention::Preset;

use crate::evaluate::{DEPTHS, PRESETS, Score, Scores};
use crate::recipe::Recipe;
use crate::tasks::Task;

/// The text of the card.
pub fn card(recipe: &Recipe, parameters: u64, scores: &Scores) -> String {
    let model = &recipe.model;
    let tokens: usize = recipe.stages.iter().map(|stage| stage.steps * stage.batch * stage.length).sum();
    let longest = recipe.stages.iter().map(|stage| stage.length).max().unwrap_or(0);
    let mut text = format!(
        "# Embedded long-context model\n\n\
         A small InternLM2 model that continues English of the 19th century and finds keys in long texts: \
         {:.2} million parameters, {} layers, {} heads of {} on {} key/value heads, stored in bf16. It exists to show \
         SampleAttention on any machine; it knows nothing and holds no conversation.\n\n\
         ## Training\n\n\
         From scratch, with `examples/train_embedded` (seed {}): {} steps, {:.0} million tokens, sequences of up to \
         {longest} tokens with positions up to {}. The text is public domain, from the Debian packages \
         `r-cran-janeaustenr` (five of six novels by Jane Austen) and `bible-kjv-text`; into it statements and \
         questions about them are written by a program.\n\n\
         ## Evaluation\n\n\
         The book (Pride and Prejudice), the numbers and the words below are in no training sequence.\n\n\
         Held-out text: {:.3} nats a token.\n\n\
         Right answers, every token of them; depths spread evenly:\n\n",
        parameters as f64 / 1e6,
        model.layers,
        model.heads,
        model.hidden_size / model.heads,
        model.kv_heads,
        recipe.seed,
        recipe.steps(),
        tokens as f64 / 1e6,
        model.context,
        scores.text,
    );
    let lengths = &recipe.evaluation.lengths;
    let columns: Vec<(usize, Preset)> =
        lengths.iter().flat_map(|&length| PRESETS.map(|preset| (length, preset))).collect();
    let header: String = columns.iter().map(|(length, preset)| format!(" {length}, {preset} |")).collect();
    let _ = writeln!(text, "| question |{header}\n| --- |{}", " --- |".repeat(columns.len()));
    let score = |task: Task, length: usize, preset: Preset| -> Option<&Score> {
        scores.answers.iter().find(|s| s.task == task && s.length == length && s.preset == preset)
    };
    for task in Task::ASKED {
        let cell = |&(length, preset): &(usize, Preset)| match score(task, length, preset) {
            Some(score) => format!(" {} of {} |", score.right(), score.prompts()),
            None => " |".to_string(),
        };
        let _ = writeln!(text, "| {} |{}", task.name(), columns.iter().map(cell).collect::<String>());
    }
    let _ = writeln!(text, "\nOne key by depth, from the beginning of the text to its end:\n");
    let header: String = (0..DEPTHS).map(|part| format!(" {}% |", 100 * part / DEPTHS)).collect();
    let _ = writeln!(text, "| length, attention |{header}\n| --- |{}", " --- |".repeat(DEPTHS));
    for (length, preset) in &columns {
        if let Some(score) = score(Task::Key, *length, *preset) {
            let cells = score.depths.iter().map(|(right, prompts)| format!(" {right} of {prompts} |"));
            let _ = writeln!(text, "| {length}, {preset} |{}", cells.collect::<String>());
        }
    }
    text
}
