//! Stop strings in text that comes piece by piece.

/// Passes text on until a stop string appears, and never shows a part of one.
#[derive(Debug, Clone)]
pub struct StopStrings {
    stops: Vec<String>,
    held: String,
}

impl StopStrings {
    /// Empty stop strings are ignored.
    pub fn new(stops: impl IntoIterator<Item = String>) -> Self {
        Self { stops: stops.into_iter().filter(|stop| !stop.is_empty()).collect(), held: String::new() }
    }

    /// Takes more text; what may be shown now, and whether a stop string ended it.
    pub fn push(&mut self, text: &str) -> (String, bool) {
        self.held.push_str(text);
        if let Some(at) = self.stops.iter().filter_map(|stop| self.held.find(stop)).min() {
            let shown = self.held[..at].to_string();
            self.held.clear();
            return (shown, true);
        }
        let begins = |at: usize| self.stops.iter().any(|stop| stop.starts_with(&self.held[at..]));
        let keep =
            self.held.char_indices().map(|(at, _)| at).find(|&at| begins(at)).unwrap_or(self.held.len());
        let held = self.held.split_off(keep);
        (std::mem::replace(&mut self.held, held), false)
    }

    /// The text held back at the end.
    pub fn finish(self) -> String {
        self.held
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stop_strings_hide_their_parts() {
        let mut stops = StopStrings::new(["END".to_string(), "五六".to_string(), String::new()]);
        assert_eq!(stops.push("one E"), ("one ".to_string(), false));
        assert_eq!(stops.push("NO 五"), ("ENO ".to_string(), false));
        assert_eq!(stops.push("七 EN"), ("五七 ".to_string(), false));
        assert_eq!(stops.push("D more"), (String::new(), true));
    }

    #[test]
    fn held_text_comes_at_the_end() {
        let mut stops = StopStrings::new(["</s>".to_string()]);
        assert_eq!(stops.push("a </"), ("a ".to_string(), false));
        assert_eq!(stops.finish(), "</");
    }
}
