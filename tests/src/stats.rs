//! What the daemon prints on `SIGUSR1`.

use std::collections::BTreeMap;

/// One report of the daemon: for each disk a line, a table with a line for each queue, and a line for each kind of
/// error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stats {
    text: String,
}

impl Stats {
    /// Wraps a report.
    pub fn new(text: &str) -> Self {
        Self { text: text.to_owned() }
    }

    /// The report as it was printed.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The report of each disk by itself.
    pub fn disks(&self) -> Vec<Stats> {
        let mut disks: Vec<Stats> = Vec::new();
        for line in self.text.lines() {
            if line.starts_with("disk ") || disks.is_empty() {
                disks.push(Stats::new(""));
            }
            if let Some(disk) = disks.last_mut() {
                disk.text.push_str(line);
                disk.text.push('\n');
            }
        }
        disks
    }

    /// A column of whole numbers of the table, by queue; of the last disk, where there are several.
    pub fn column(&self, name: &str) -> BTreeMap<u32, u64> {
        let mut lines = self.text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        let head = lines.find(|words| words.first() == Some(&"queue")).unwrap_or_default();
        let Some(at) = head.iter().position(|&word| word == name) else { return BTreeMap::new() };
        lines.filter_map(|words| Some((words.first()?.parse().ok()?, words.get(at)?.parse().ok()?))).collect()
    }

    /// The requests each queue has completed.
    pub fn requests(&self) -> BTreeMap<u32, u64> {
        self.column("requests")
    }

    /// How often queues have waited for an address to be translated.
    pub fn iotlb_misses(&self) -> u64 {
        let lines = self.text.lines().filter_map(|line| line.strip_prefix("iotlb misses "));
        lines.filter_map(|count| count.parse::<u64>().ok()).sum()
    }

    /// The requests that have failed, over all queues of all disks.
    pub fn errors(&self) -> u64 {
        self.disks().iter().flat_map(|disk| disk.column("errors").into_values()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::Stats;

    #[test]
    fn finds_the_columns_of_the_table() {
        let stats = Stats::new(
            "disk a 4096 bytes, 2 queues\nqueue requests read errors p50-us\n0 10 512 0 1.5\n1 7 0 2 2.25\nall 17 512 2 2.0\n",
        );
        assert_eq!(stats.requests().into_iter().collect::<Vec<_>>(), [(0, 10), (1, 7)]);
        assert_eq!(stats.errors(), 2);
        assert!(stats.column("none").is_empty());
    }

    #[test]
    fn tells_disks_apart() {
        let stats = Stats::new(
            "disk a 1 bytes\nqueue requests errors\n0 1 0\ndisk b 2 bytes\nqueue requests errors\n0 5 2\n",
        );
        let disks = stats.disks();
        assert_eq!(disks.iter().map(|disk| disk.requests()[&0]).collect::<Vec<_>>(), [1, 5]);
        assert_eq!(disks.iter().map(Stats::errors).collect::<Vec<_>>(), [0, 2]);
        assert_eq!(stats.errors(), 2);
    }
}
