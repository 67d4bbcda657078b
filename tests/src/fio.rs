//! Verified load inside the guest.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::qemu::Vm;

/// A run of fio with `verify=crc32c`, direct I/O through libaio and 64 requests in flight per job.
#[derive(Debug, Clone)]
pub struct Fio {
    name: String,
    args: String,
}

/// What a run of fio did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FioResult {
    /// Reads that ended well, those for verification included.
    pub reads: u64,
    /// Writes that ended well.
    pub writes: u64,
}

impl Fio {
    /// A mixed random load of 4 KiB blocks over `file` with one job.
    pub fn new(name: &str, file: &str) -> Self {
        let args = format!(
            "--name={name} --filename={file} --ioengine=libaio --direct=1 --iodepth=64 --verify=crc32c \
             --verify_fatal=1 --group_reporting --output-format=json --output=/tmp/{name}.json"
        );
        Self { name: name.to_owned(), args }
    }

    /// Adds an option, in place of the default if there is one.
    #[must_use]
    pub fn arg(mut self, arg: &str) -> Self {
        self.args.push_str(" --");
        self.args.push_str(arg);
        self
    }

    /// Sets the number of jobs and how much each of them covers, side by side, each on a CPU of its own.
    #[must_use]
    pub fn jobs(self, jobs: u32, each_mib: u64) -> Self {
        let cpus = jobs - 1;
        self.arg(&format!("numjobs={jobs} --size={each_mib}m --offset_increment={each_mib}m"))
            .arg(&format!("cpus_allowed=0-{cpus} --cpus_allowed_policy=split"))
    }

    /// Runs it to the end.
    pub fn run(&self, vm: &mut Vm, limit: Duration) -> Result<FioResult> {
        let output = vm.run_for(&format!("fio {}", self.args), limit)?;
        self.result(vm, output.code, &output.stdout)
    }

    /// Starts it in the background.
    pub fn start(&self, vm: &mut Vm) -> Result<()> {
        vm.start(&self.name, &format!("fio {}", self.args))
    }

    /// Starts it in the background, again and again until [`Fio::finish`].
    pub fn start_loop(&self, vm: &mut Vm) -> Result<()> {
        let Self { name, args } = self;
        vm.check("rm -f /tmp/stop")?;
        vm.start(name, &format!("while ! test -e /tmp/stop; do fio {args} || exit 1; done"))
    }

    /// Lets the last round of [`Fio::start_loop`] end and fails if any round has failed.
    pub fn finish(&self, vm: &mut Vm, limit: Duration) -> Result<FioResult> {
        self.expect_running(vm)?;
        vm.check("touch /tmp/stop")?;
        self.join(vm, limit)
    }

    /// Waits until a background run has done some I/O on `disk` (such as `vda`).
    pub fn wait_busy(&self, vm: &mut Vm, disk: &str) -> Result<()> {
        let at_work = format!(
            "test $(awk '{{ print $1 + $5 }}' /sys/block/{disk}/stat) -gt $(cat /tmp/{}.base)",
            self.name
        );
        vm.check(&format!(
            "awk '{{ print $1 + $5 + 500 }}' /sys/block/{disk}/stat >/tmp/{}.base",
            self.name
        ))?;
        vm.check_soon(&at_work, Duration::from_secs(60))
    }

    /// Fails unless the background run is still at work.
    pub fn expect_running(&self, vm: &mut Vm) -> Result<()> {
        ensure!(vm.is_running(&self.name)?, "fio {} has ended too early to prove anything", self.name);
        Ok(())
    }

    /// Waits for the end of a background run.
    pub fn join(&self, vm: &mut Vm, limit: Duration) -> Result<FioResult> {
        let output = vm.join(&self.name, limit)?;
        self.result(vm, output.code, &output.stdout)
    }

    fn result(&self, vm: &mut Vm, code: i32, said: &str) -> Result<FioResult> {
        ensure!(code == 0, "fio {}: exit code {code}\n{said}", self.name);
        let text = vm.check(&format!("cat /tmp/{}.json", self.name))?;
        // fio may have something to remark before it.
        let start = text.find("{\n").with_context(|| format!("fio's answer: {text}"))?;
        let json: Value =
            serde_json::from_str(&text[start..]).with_context(|| format!("fio's answer: {text}"))?;
        let jobs = json["jobs"].as_array().context("fio reports no jobs")?;
        let mut result = FioResult { reads: 0, writes: 0 };
        for job in jobs {
            ensure!(job["error"] == 0, "fio {}: error {}", self.name, job["error"]);
            result.reads += job["read"]["total_ios"].as_u64().context("total_ios")?;
            result.writes += job["write"]["total_ios"].as_u64().context("total_ios")?;
        }
        ensure!(result.reads > 0 && result.writes > 0, "fio {} has verified nothing: {result:?}", self.name);
        Ok(result)
    }
}
