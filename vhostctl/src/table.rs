//! What a daemon answers, as tables for people.

use comfy_table::presets::NOTHING;
use comfy_table::{CellAlignment, Table};
use serde_json::{Map, Value};

/// An object as a line for each key, a list of objects as a table; lists in an object follow as tables of their own.
pub fn text(value: &Value) -> String {
    match value {
        Value::Array(rows) => table(rows),
        Value::Object(object) => {
            let mut out = Table::new();
            out.load_style(NOTHING);
            let flat = flat(object);
            for (key, value) in flat.iter().filter(|(_, value)| !value.is_array()) {
                out.add_row([key.as_str(), &cell(key, value)]);
            }
            let lists =
                object.values().filter_map(Value::as_array).map(|rows| format!("\n\n{}", table(rows)));
            trimmed(&out.to_string()) + &lists.collect::<String>()
        }
        other => cell("", other),
    }
}

fn table(rows: &[Value]) -> String {
    let rows: Vec<_> = rows.iter().filter_map(Value::as_object).map(flat).collect();
    if rows.is_empty() {
        return "none".into();
    }
    // Not all rows have all of them: each is behind what it follows where it was found.
    let mut first: Vec<&(String, Value)> = Vec::new();
    for row in &rows {
        let mut at = 0;
        for pair in row {
            if let Some(found) = first.iter().position(|(key, _)| *key == pair.0) {
                at = found + 1;
            } else {
                first.insert(at, pair);
                at += 1;
            }
        }
    }
    let keys: Vec<_> = first.iter().map(|(key, _)| key).collect();
    let mut out = Table::new();
    out.load_style(NOTHING).set_header(keys.iter().map(|key| key.to_uppercase()));
    for row in &rows {
        let value =
            |key: &&String| row.iter().find(|(k, _)| k == *key).map_or("-".into(), |(k, v)| cell(k, v));
        out.add_row(keys.iter().map(value));
    }
    for (i, (_, value)) in first.iter().enumerate() {
        if let (true, Some(column)) = (value.is_number(), out.column_mut(i)) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    trimmed(&out.to_string())
}

fn trimmed(table: &str) -> String {
    table.lines().map(str::trim_end).collect::<Vec<_>>().join("\n")
}

/// With what is in objects beside the rest.
fn flat(object: &Map<String, Value>) -> Vec<(String, Value)> {
    let mut all = Vec::new();
    for (key, value) in object {
        match value {
            Value::Object(inner) => all.extend(flat(inner)),
            other => all.push((key.clone(), other.clone())),
        }
    }
    all
}

/// Times are given in nanoseconds, and read in microseconds.
fn cell(key: &str, value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Bool(true) => "yes".into(),
        Value::Bool(false) => "no".into(),
        Value::Number(n) if key.ends_with("-ns") => {
            n.as_f64().map_or_else(|| n.to_string(), |ns| format!("{:.1}us", ns / 1000.0))
        }
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_tables_and_objects_are_lines() {
        let disks = serde_json::json!([
            { "name": "a", "paused": true, "all": { "requests": 7, "p50-ns": 1500 } },
            { "name": "longer", "paused": false, "all": { "requests": 12345, "p50-ns": 20 } },
        ]);
        let said = text(&disks);
        let lines: Vec<Vec<&str>> = said.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[0].len(), 4, "{said}");
        assert!(
            lines[1].contains(&"1.5us") && lines[2].contains(&"longer") && lines[2].contains(&"no"),
            "{said}"
        );
        let ports = serde_json::json!([
            { "name": "a", "mac": "x", "up": true },
            { "name": "b", "switch": "blue", "up": true },
        ]);
        let said = text(&ports);
        let lines: Vec<Vec<&str>> = said.lines().map(|line| line.split_whitespace().collect()).collect();
        let heads = ["NAME", "MAC", "SWITCH", "UP"];
        assert!(lines[0].len() == 4 && heads.iter().all(|head| lines[0].contains(head)), "{said}");
        let cell = |row: usize, head: &str| lines[row][lines[0].iter().position(|h| *h == head).unwrap()];
        assert_eq!(
            [cell(1, "MAC"), cell(1, "SWITCH"), cell(2, "MAC"), cell(2, "SWITCH")],
            ["x", "-", "-", "blue"]
        );
        let one = text(&serde_json::json!({ "name": "a", "queues": [{ "queue": 0 }] }));
        assert!(one.contains("name") && one.contains("QUEUE"), "{one}");
        assert_eq!(text(&serde_json::json!([])), "none");
    }
}
