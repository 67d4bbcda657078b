//! Somebody who reads the API's description and then says anything: calls of the right form, and of wrong ones. Each answer
//! is one that the description has, and the daemon lives. `KICKLESS_CONTROL_CALLS` says how many.

use std::collections::{BTreeMap, HashMap};

use jsonschema::Validator;
use kickless_tests::image::Image;
use kickless_tests::random::Random;
use serde_json::{Map, Value, json};

use crate::rig::Rig;

fn calls() -> usize {
    std::env::var("KICKLESS_CONTROL_CALLS").ok().and_then(|n| n.parse().ok()).unwrap_or(2000)
}

struct Fuzz<'a> {
    rig: &'a Rig,
    document: Value,
    /// By the schema.
    validators: HashMap<String, Validator>,
    random: Random,
}

impl Fuzz<'_> {
    fn one<T: Clone>(&mut self, of: &[T]) -> T {
        of[self.random.below(of.len())].clone()
    }

    /// What a text may be: of names and files only those that do no harm here.
    fn text(&mut self, key: &str) -> String {
        let rig = self.rig;
        let n = self.random.below(6);
        let all = match key {
            "socket-path" => {
                vec![rig.path(&format!("f{n}.sock")), "/nonexistent/x.sock".into(), String::new()]
            }
            "blk-file" => vec![rig.path(&format!("f{n}.img")), "/dev/null".into(), rig.path("none")],
            "mac" => vec!["52:54:00:00:00:01".into(), "01:00:00:00:00:00".into(), "x".into()],
            // None that would be made.
            "tap" => vec![String::new(), "a name that no interface has".into()],
            "link" => vec!["up".into(), "down".into(), "on".into()],
            "filter" => vec!["arp".into(), "tcp port 80".into(), "nothing".into()],
            "record" | "file" => vec![rig.path(&format!("f{n}.capture")), "/nonexistent/x".into()],
            "backend" => vec!["ram:1M".into(), "null:1G".into(), "null:512".into(), "ram:0".into()],
            "name" => {
                vec![
                    format!("f{n}"),
                    format!("f{n}"),
                    "kept".into(),
                    "kept".into(),
                    "kept".into(),
                    "../x".into(),
                    "ä".into(),
                    "%00".into(),
                ]
            }
            "switch" => vec!["kept".into(), "kept".into(), format!("f{n}"), String::new()],
            "cache" => vec!["writeback".into(), "writethrough".into(), "none".into()],
            "poll" => vec!["busy".into(), "adaptive".into(), "event".into(), "often".into()],
            "size" => vec!["1M".into(), "2M".into(), "0".into(), "x".into()],
            _ => vec![String::new(), "x".into(), "\u{1f980}\n".into()],
        };
        self.one(&all)
    }

    fn anything(&mut self) -> Value {
        let all = [
            json!(null),
            json!(-1),
            json!(1e300),
            json!([1]),
            json!({ "a": 1 }),
            // A path at times, so not one where the tests are run.
            json!(self.rig.path("x")),
            json!(u64::MAX),
        ];
        self.one(&all)
    }

    fn value(&mut self, key: &str, schema: &Value) -> Value {
        // Of several types, the first.
        match schema["type"].as_str().or_else(|| schema["type"][0].as_str()) {
            Some("boolean") => json!(self.random.below(2) == 0),
            Some("integer") => {
                let (least, most) = (schema["minimum"].as_u64().unwrap_or(0), schema["maximum"].as_u64());
                let [a, b] = [least, most.unwrap_or(3).min(4)];
                let some = self.random.below(4) as u64;
                json!(self.one(&[a, b, some, 256]))
            }
            Some("array") => json!([self.text(key)]),
            _ => json!(self.text(key)),
        }
    }

    /// A body by its schema, or nearly so.
    fn body(&mut self, schema: &Value) -> Vec<u8> {
        let schema = self.resolved(schema);
        let mut object = Map::new();
        let required = schema["required"].as_array().cloned().unwrap_or_default();
        for (key, of) in schema["properties"].as_object().into_iter().flatten() {
            if required.contains(&json!(key)) || self.random.below(3) == 0 {
                let value = self.value(key, of);
                object.insert(key.clone(), value);
            }
        }
        // Every other disk or port says only what one of its kind may, if not with any value.
        if schema["properties"].get("socket-path").is_some() && self.random.below(2) == 0 {
            let is_disk = schema["properties"].get("blk-file").is_some();
            let port = ["wait", "mac", "mtu", "link", "router", "isolated", "tx-pps", "max-macs"].as_slice();
            let disk = ["allow-discards", "cache", "num-queues", "packed", "read-only", "serial"].as_slice();
            let may = if is_disk { disk } else { port };
            object.retain(|key, _| may.contains(&&**key));
            let name = format!("f{}", self.random.below(6));
            object.insert("socket-path".into(), json!(self.rig.path(&format!("{name}.sock"))));
            object.insert("name".into(), json!(name));
            if is_disk {
                object.insert("backend".into(), json!("null:1M"));
            }
        }
        match self.random.below(12) {
            0 => {
                let value = self.anything();
                object.insert("wings".into(), value);
            }
            1 => {
                let keys: Vec<_> = object.keys().cloned().collect();
                if !keys.is_empty() {
                    let (key, value) = (self.one(&keys), self.anything());
                    object.insert(key, value);
                }
            }
            2 => return self.anything().to_string().into_bytes(),
            3 => {
                let mut bytes = Value::Object(object).to_string().into_bytes();
                let at = self.random.below(bytes.len());
                bytes[at] = self.random.number() as u8;
                return bytes;
            }
            _ => {}
        }
        Value::Object(object).to_string().into_bytes()
    }

    fn resolved(&self, schema: &Value) -> Value {
        let path = schema["$ref"].as_str().and_then(|r| r.strip_prefix('#'));
        path.map_or_else(|| schema.clone(), |path| self.document.pointer(path).unwrap().clone())
    }

    fn validator(&mut self, schema: &Value) -> &Validator {
        let document = &self.document;
        self.validators.entry(schema.to_string()).or_insert_with(|| {
            let mut whole = schema.clone();
            whole["components"] = document["components"].clone();
            jsonschema::validator_for(&whole).unwrap()
        })
    }

    /// Calls once; what was answered.
    fn call(&mut self, path: &str, method: &str, operation: &Value) -> u16 {
        let mut target = path.to_owned();
        for parameter in operation["parameters"].as_array().into_iter().flatten() {
            let name = parameter["name"].as_str().unwrap();
            let value = match self.value(name, &parameter["schema"]) {
                Value::String(text) => text,
                other => other.to_string(),
            };
            // One stays, for calls to be about.
            let is_kept = method == "delete" && path.ends_with("{name}") && value == "kept";
            let value = control::client::part(if is_kept { "f0" } else { &value });
            match parameter["in"].as_str().unwrap() {
                "path" => target = target.replace(&format!("{{{name}}}"), &value),
                _ if self.random.below(2) == 0 => target = format!("{target}?{name}={value}"),
                _ => {}
            }
        }
        let schema = operation.pointer("/requestBody/content/application~1json/schema").cloned();
        let body = schema.map(|schema| self.body(&schema)).unwrap_or_default();
        let said = String::from_utf8_lossy(&body).into_owned();
        let answer = self.rig.client.send(&method.to_uppercase(), &target, body);
        let answer = answer.unwrap_or_else(|e| panic!("{method} {target} {said}: {e:#}"));
        let documented = &operation["responses"][answer.status.to_string()];
        let text = String::from_utf8_lossy(&answer.body);
        assert!(
            documented.is_object(),
            "{method} {target} {said}: {} is not documented: {text}",
            answer.status
        );
        let Some(content) = documented.get("content").and_then(Value::as_object) else {
            assert!(answer.body.is_empty(), "{method} {target}: {text}");
            return answer.status;
        };
        let kind = answer.content_type.split(';').next().unwrap();
        let content =
            content.get(kind).unwrap_or_else(|| panic!("{method} {target}: {kind} is not documented"));
        if kind.ends_with("json") {
            let body: Value = serde_json::from_slice(&answer.body).unwrap();
            let wrong: Vec<_> =
                self.validator(&content["schema"]).iter_errors(&body).map(|e| e.to_string()).collect();
            assert!(wrong.is_empty(), "{method} {target} {said}: {wrong:?} in {text:.500}");
        }
        answer.status
    }
}

#[test]
fn every_answer_is_one_that_is_documented() {
    let rig = Rig::start("", &[]);
    for n in 0..6 {
        Image::create(&rig.scene, &format!("f{n}.img"), 1 << 20).unwrap();
    }
    let image = Image::create(&rig.scene, "kept.img", 1 << 20).unwrap();
    rig.add("kept", &format!("direct=off,blk-file={}", image.path().display()));
    ask_anything(rig, "/v1/disks", 18, 4);
}

#[test]
fn every_answer_about_ports_is_one_that_is_documented() {
    let rig = Rig::start_net("poll = 'event'\n[[switch]]\n[[switch]]\nname = 'kept'\n", &[]);
    rig.add_port("kept", "");
    rig.add_port("other", "switch=kept");
    // No reactor comes or goes.
    ask_anything(rig, "/v1/ports", 17, 4);
}

fn ask_anything(mut rig: Rig, list: &str, least: usize, most_refused: usize) {
    let document = rig.does(200, "GET", "/v1/openapi.json", None);
    let operations: Vec<(String, String, Value)> = document["paths"]
        .as_object()
        .unwrap()
        .iter()
        .flat_map(|(path, methods)| {
            let methods = methods.as_object().unwrap().iter();
            methods.map(move |(method, operation)| (path.clone(), method.clone(), operation.clone()))
        })
        .collect();
    assert!(operations.len() >= least, "{} calls", operations.len());
    let seed = std::process::id().into();
    println!("seed {seed}");
    let mut seen = BTreeMap::new();
    let mut fuzz = Fuzz { rig: &rig, document, validators: HashMap::new(), random: Random(seed) };
    for i in 0..calls() {
        // Each at least now and then; those that make disks more often.
        let at = if i % 3 == 0 { fuzz.random.below(operations.len()) } else { i % operations.len() };
        let (path, method, operation) = &operations[at];
        let status = fuzz.call(path, method, operation);
        *seen.entry((format!("{method} {path}"), status)).or_insert(0usize) += 1;
    }
    println!("answers: {seen:#?}");
    let went_well = |name: &String| seen.keys().any(|(n, status)| n == name && *status < 300);
    let names = operations.iter().map(|(path, method, _)| format!("{method} {path}"));
    let never: Vec<_> = names.filter(|name| !went_well(name)).collect();
    // By chance a few calls may have met nothing but what it refuses.
    assert!(never.len() <= most_refused, "{never:?} never went well");
    rig.does(200, "GET", list, None);
    rig.end();
}
