use long_context_page::Page;
use long_context_page::heatmap::{HeatMap, Scale};

use super::PerplexityReport;

impl PerplexityReport {
    /// A page with the table, the perplexities by position, and a map of the divergences.
    pub fn page(&self, model: &str) -> String {
        let mut page = Page::new("Perplexity against dense attention");
        let config = &self.config;
        page.paragraph(&format!("{model}: {} windows of {} tokens.", config.windows, config.tokens));
        let (head, rows) = self.rows();
        page.table(&head, rows);
        page.paragraph(
            "Density: kept over causal query-key pairs. Recall: kept probability mass of the sampled rows, mean \
             and minimum. KL: mean divergence of the predicted distribution from the dense one, in nats. Same \
             choice: tokens where both find the same one most likely.",
        );
        page.heading("By position");
        let (head, rows) = self.positions();
        page.table(&head.iter().map(String::as_str).collect::<Vec<_>>(), rows);
        if let Some(map) = self.map() {
            page.figure(&map, "KL to dense by position, in thousandths of a nat");
        }
        page.finish()
    }

    /// Divergences, attentions by positions; none without an attention beside the dense one.
    fn map(&self) -> Option<String> {
        let others = self.results.get(1..).filter(|others| !others.is_empty())?;
        let thousandths = |divergence: f64| Some(1000.0 * divergence);
        let cells: Vec<Vec<Option<f64>>> = others
            .iter()
            .map(|result| {
                result.buckets.iter().map(|bucket| thousandths(bucket.quality.divergence)).collect()
            })
            .collect();
        let highest = cells.iter().flatten().flatten().copied().fold(1.0, f64::max);
        let rows: Vec<String> = others.iter().map(|result| result.attention.clone()).collect();
        let columns: Vec<String> = others[0].buckets.iter().map(|bucket| bucket.start.to_string()).collect();
        let map = HeatMap {
            rows: &rows,
            columns: &columns,
            row_title: "",
            column_title: "from position",
            cells: &cells,
            range: (0.0, highest),
            scale: Scale::Loss,
            decimals: Some(0),
        };
        Some(map.svg())
    }
}
