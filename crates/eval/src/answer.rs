//! Short greedy answers, with guesses of what they will say.

use std::ops::ControlFlow;

use long_context::generate::Engine;
use long_context::sampler::most_likely;

use crate::Result;

/// A prompt and how its answer ends.
#[derive(Debug, Clone, Copy)]
pub struct Ask<'a> {
    /// Ids of the prompt.
    pub prompt: &'a [u32],
    /// Whether the engine may keep what it holds of the prompt from the call before, with the same attention.
    pub keep: bool,
    /// Tokens that the answer is expected to hold. Where it comes to the first of one, the rest is run
    /// along with it and kept as far as the model agrees: the same answer in fewer steps.
    pub guesses: &'a [Vec<u32>],
    /// Tokens to generate at most.
    pub max_tokens: usize,
    /// Tokens that must come before a stop token may.
    pub min_tokens: usize,
    /// Ids that end the answer.
    pub stop: &'a [u32],
}

/// The most likely continuation of a prompt, token by token, until a stop token or until `done` says so.
///
/// # Errors
///
/// A prompt that does not fit, or a failing device.
pub fn answer(
    engine: &mut dyn Engine,
    ask: &Ask<'_>,
    done: &mut dyn FnMut(&[u32]) -> bool,
) -> Result<Vec<u32>> {
    let common = engine.history().iter().zip(ask.prompt).take_while(|(held, id)| held == id).count();
    // The logits of the last token are needed, so it is run again where everything is held.
    let held = if ask.keep { common.min(ask.prompt.len().saturating_sub(1)) } else { 0 };
    engine.truncate(held);
    let mut ids = Vec::new();
    let mut on_chunk = |_| ControlFlow::Continue(());
    let Some(mut logits) = engine.prefill(&ask.prompt[held..], &mut on_chunk)? else { return Ok(ids) };
    while ids.len() < ask.max_tokens {
        if ids.len() < ask.min_tokens {
            for &id in ask.stop {
                if let Some(logit) = logits.get_mut(id as usize) {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
        let next = most_likely(&logits);
        if ask.stop.contains(&next) {
            break;
        }
        let held = engine.history().len();
        let room = (engine.capacity() - held).min(ask.max_tokens - ids.len());
        if engine.capacity() == held || room == 1 {
            ids.push(next);
            break;
        }
        let guess = ask.guesses.iter().find(|guess| guess.first() == Some(&next) && guess.len() <= room);
        let run: &[u32] = guess.map_or(std::slice::from_ref(&next), |guess| guess);
        let mut rows = Vec::new();
        engine.logits(run, &mut |part| rows.extend(part))?;
        let vocab = rows.len() / run.len();
        let row = |index: usize| &rows[index * vocab..][..vocab];
        let agreed = (1..run.len()).take_while(|&at| most_likely(row(at - 1)) == run[at]).count() + 1;
        ids.extend(&run[..agreed]);
        if done(&ids) {
            break;
        }
        engine.truncate(held + agreed);
        logits = row(agreed - 1).to_vec();
    }
    Ok(ids)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Script;

    fn ask<'a>(guesses: &'a [Vec<u32>], max_tokens: usize) -> Ask<'a> {
        Ask { prompt: &[1, 2, 3], keep: false, guesses, max_tokens, min_tokens: 0, stop: &[9] }
    }

    #[test]
    fn guesses_change_the_steps_and_not_the_answer() {
        let text = [4, 5, 6, 7, 8, 9];
        let answer_with = |guesses: &[Vec<u32>]| {
            let mut engine = Script::new(&[1, 2, 3], &text);
            let ids = answer(&mut engine, &ask(guesses, 10), &mut |_| false).unwrap();
            (ids, engine.calls)
        };
        let (plain, steps) = answer_with(&[]);
        assert_eq!(plain, text[..5]);
        let (guessed, fewer) = answer_with(&[vec![5, 6, 7]]);
        assert_eq!(guessed, plain);
        assert!(fewer < steps, "{fewer} calls with a guess, {steps} without");
        // A guess that is wrong after its second token.
        assert_eq!(answer_with(&[vec![5, 6, 1, 1]]).0, plain);
    }

    #[test]
    fn an_answer_ends_where_it_is_told_to() {
        let text = [4, 5, 6, 7, 8, 9];
        let mut engine = Script::new(&[1, 2, 3], &text);
        assert_eq!(answer(&mut engine, &ask(&[], 2), &mut |_| false).unwrap(), [4, 5]);
        assert_eq!(answer(&mut engine, &ask(&[], 9), &mut |ids| ids.contains(&6)).unwrap(), [4, 5, 6]);
    }

    #[test]
    fn what_is_held_is_kept_on_request_alone() {
        let mut engine = Script::new(&[1, 2, 3], &[4, 5, 6]);
        let mut ids = answer(&mut engine, &ask(&[], 2), &mut |_| false).unwrap();
        ids.splice(0..0, [1, 2, 3]);
        for (keep, run) in [(true, 1), (false, 5)] {
            engine.longest = 0;
            let longer = Ask { prompt: &ids, keep, ..ask(&[], 1) };
            assert_eq!(answer(&mut engine, &longer, &mut |_| false).unwrap(), [6]);
            assert_eq!(engine.longest, run);
        }
    }

    #[test]
    fn an_answer_may_be_made_to_begin() {
        let mut engine = Script::new(&[1, 2, 3], &[9, 5, 9]);
        assert_eq!(answer(&mut engine, &ask(&[], 4), &mut |_| false).unwrap(), [0u32; 0]);
        let forced = Ask { min_tokens: 1, ..ask(&[], 4) };
        assert_eq!(answer(&mut engine, &forced, &mut |_| false).unwrap().len(), 4);
    }
}
