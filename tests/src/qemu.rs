//! The virtual machine.

pub mod migration;
pub mod nic;
pub mod overlay;
pub mod release;

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::{Value, json};

use crate::accel::{self, Accel};
use crate::agent::{Agent, Output, Shell};
use crate::process::{self, Process};
use crate::qemu::nic::Nic;
use crate::qemu::overlay::Overlay;
use crate::qemu::release::Release;
use crate::qmp::Qmp;
use crate::scene::{Scene, tail};
use crate::wait;

/// How long the guest may take from power-on to the agent's prompt.
pub const BOOT_LIMIT: Duration = Duration::from_secs(120);

/// How long the guest may take to let go of a device.
const UNPLUG_LIMIT: Duration = Duration::from_secs(40);

/// The kernel's command line, but for what [`VmBuilder::kernel_arg`] adds: little to say, nothing to probe for,
/// reboot on panic (which the harness notices).
pub const KERNEL_ARGS: &str = "console=ttyS0 loglevel=5 panic=-1 oops=panic mitigations=off nokaslr \
     no_timer_check nowatchdog audit=0 cryptomgr.notests rcupdate.rcu_expedited=1 \
     memhp_default_state=online_movable";

/// Words of a kernel that something is wrong with.
pub const KERNEL_COMPLAINTS: [&str; 6] =
    ["I/O error", "BUG:", "WARNING:", "blocked for more than", "EXT4-fs error", "Oops"];

/// What an emulated guest has beyond whole mebibytes, so that it survives its migration. QEMU before 9.0 reads the dirty
/// pages of a block of memory that is a multiple of 64 pages by a short cut (`cpu_physical_memory_sync_dirty_bitmap`) that
/// does not tell the translator's TLBs: the guest's next stores to those pages are not noticed, and are lost on the way.
const ODD_KIB: u64 = 8;

/// The emulator.
pub const QEMU: &str = "qemu-system-x86_64";

/// Where the guest's kernel and initramfs are: `KICKLESS_GUEST_DIR`, or `target/guest` of the workspace.
pub fn guest_dir() -> PathBuf {
    std::env::var_os("KICKLESS_GUEST_DIR")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/guest"), PathBuf::from)
}

/// Which program is missing for any virtual machine of QEMU's, if one is.
pub fn missing_program() -> Option<String> {
    let missing = [QEMU, "setpriv", "timeout"].into_iter().find(|name| process::find_program(name).is_none());
    missing.map(|name| format!("{name} is not installed"))
}

/// Why Linux cannot run in QEMU here, if it cannot.
pub fn missing_needs() -> Option<String> {
    if let Some(reason) = missing_program() {
        return Some(reason);
    }
    let guest = guest_dir();
    (!guest.join("vmlinux").is_file() || !guest.join("initramfs").is_file())
        .then(|| format!("no guest in {}: run scripts/guest-image.sh", guest.display()))
}

/// A vhost-user-blk disk.
#[derive(Debug, Clone)]
pub struct Disk {
    id: String,
    socket: PathBuf,
    props: serde_json::Map<String, Value>,
}

impl Disk {
    /// A disk with four queues of 256 entries, served at `socket`.
    pub fn new(id: &str, socket: &Path) -> Self {
        let disk = Self { id: id.to_owned(), socket: socket.to_owned(), props: serde_json::Map::new() };
        disk.prop("num-queues", 4).prop("queue-size", 256)
    }

    /// Sets a property of the device.
    #[must_use]
    pub fn prop(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.props.insert(name.to_owned(), value.into());
        self
    }

    /// Has it use I/O virtual addresses, where the machine has an IOMMU; behind a port of its own, without which a device
    /// of QEMU's is no PCI Express device, and has no translation service (ATS) for Linux to switch on.
    #[must_use]
    pub fn behind_iommu(self) -> Self {
        let port = format!("port-{}", self.id);
        self.prop("iommu_platform", true).prop("ats", true).prop("disable-legacy", "on").prop("bus", port)
    }

    fn chardev(&self) -> String {
        format!("chr-{}", self.id)
    }

    /// As it is plugged into a machine whose disks have packed rings, or not.
    fn device(&self, packed: bool) -> Value {
        let mut device = json!({ "driver": "vhost-user-blk-pci", "id": self.id, "chardev": self.chardev() });
        for (name, value) in &self.props {
            device[name] = value.clone();
        }
        if packed {
            device["packed"] = true.into();
        }
        device
    }
}

/// What a virtual machine is to be like.
#[derive(Debug, Clone)]
pub struct VmBuilder {
    memory_mib: u64,
    dimms_mib: Vec<u64>,
    packed: bool,
    cpus: u32,
    nodes: u32,
    iommu: bool,
    disks: Vec<Disk>,
    nics: Vec<Nic>,
    kernel_args: String,
    accel: Option<Accel>,
    boot_limit: Duration,
    release: Release,
    overlay: Option<Arc<Overlay>>,
    args: Vec<String>,
}

impl Default for VmBuilder {
    fn default() -> Self {
        Self {
            memory_mib: 384,
            packed: false,
            dimms_mib: Vec::new(),
            cpus: 4,
            nodes: 1,
            iommu: false,
            disks: Vec::new(),
            nics: Vec::new(),
            kernel_args: KERNEL_ARGS.to_owned(),
            accel: None,
            boot_limit: BOOT_LIMIT,
            release: Release::Stable,
            overlay: None,
            args: Vec::new(),
        }
    }
}

impl VmBuilder {
    /// Sets the size of the memory the guest boots with.
    #[must_use]
    pub fn memory_mib(mut self, mib: u64) -> Self {
        self.memory_mib = mib;
        self
    }

    /// Adds a memory module that is there from the start: another memory region for the back end.
    #[must_use]
    pub fn dimm_mib(mut self, mib: u64) -> Self {
        self.dimms_mib.push(mib);
        self
    }

    /// Sets the number of virtual CPUs.
    #[must_use]
    pub fn cpus(mut self, cpus: u32) -> Self {
        self.cpus = cpus;
        self
    }

    /// Sets on how many NUMA nodes the processors and the memory are, of both an even share on each.
    #[must_use]
    pub fn nodes(mut self, nodes: u32) -> Self {
        self.nodes = nodes;
        self
    }

    /// Puts disks that ask for it ([`Disk::behind_iommu`]) behind an IOMMU. What the guest does with it is for its
    /// command line to say.
    #[must_use]
    pub fn iommu(mut self) -> Self {
        self.iommu = true;
        self
    }

    /// Adds a disk.
    #[must_use]
    pub fn disk(mut self, disk: Disk) -> Self {
        self.disks.push(disk);
        self
    }

    /// Adds a network card.
    #[must_use]
    pub fn nic(mut self, nic: Nic) -> Self {
        self.nics.push(nic);
        self
    }

    /// Adds to the kernel's command line.
    #[must_use]
    pub fn kernel_arg(mut self, arg: &str) -> Self {
        self.kernel_args.push(' ');
        self.kernel_args.push_str(arg);
        self
    }

    /// Sets the accelerator instead of having it found out.
    #[must_use]
    pub fn accel(mut self, accel: Accel) -> Self {
        self.accel = Some(accel);
        self
    }

    /// Sets how long booting may take.
    #[must_use]
    pub fn boot_limit(mut self, limit: Duration) -> Self {
        self.boot_limit = limit;
        self
    }

    /// Sets which emulator and kernel it is made of.
    #[must_use]
    pub fn release(mut self, release: Release) -> Self {
        self.release = release;
        self
    }

    /// Lays files over the image the guest boots from.
    #[must_use]
    pub fn overlay(mut self, files: Overlay) -> Self {
        self.overlay = Some(Arc::new(files));
        self
    }

    /// Adds an option of QEMU's, as `device` and `igb`.
    #[must_use]
    pub fn arg(mut self, option: &str, value: &str) -> Self {
        self.args.extend([format!("-{option}"), value.to_owned()]);
        self
    }

    /// Starts the machine and waits for the agent in the guest. An emulated one that does not come up is started once more:
    /// on a host that stands still now and then, QEMU's emulation has been seen to hang in the kernel's first second.
    pub fn boot(self, scene: &Scene) -> Result<Vm> {
        let limit = self.boot_limit;
        let again = self.clone();
        let mut vm = self.start(scene)?;
        let first = if vm.accel == Accel::Tcg { limit / 2 } else { limit };
        match vm.wait_ready(first) {
            Err(error) if vm.accel == Accel::Tcg => {
                eprintln!("the guest has not come up in {first:?}, once more: {error:#}");
                vm.kill()?;
                vm = again.start(scene)?;
                vm.wait_ready(limit)?;
            }
            Err(error) => return Err(error),
            Ok(()) => {}
        }
        Ok(vm)
    }

    /// Starts the machine, and others meanwhile, before [`Vm::wait_ready`].
    pub fn start(self, scene: &Scene) -> Result<Vm> {
        let accel = match self.accel {
            Some(accel) => accel,
            None => accel::choose()?,
        };
        self.spawn(scene, accel, false)
    }

    /// Starts QEMU, for a guest that boots or for one that comes from elsewhere.
    fn spawn(mut self, scene: &Scene, accel: Accel, incoming: bool) -> Result<Vm> {
        self.packed = scene.packed();
        let kernel_log = scene.fresh_log("kernel");
        // Sockets next to the log, with the same number.
        let agent_path = kernel_log.with_extension("agent");
        let qmp_path = kernel_log.with_extension("qmp");
        let agent = Agent::listen(&agent_path)?;
        let qmp = Agent::listen(&qmp_path)?;
        let mut initramfs = self.release.guest("initramfs");
        if let Some(overlay) = &self.overlay {
            initramfs = kernel_log.with_extension("initramfs");
            overlay.pack(self.release, &initramfs)?;
        }
        let mut args = self.args(accel, &initramfs, &kernel_log, &agent_path, &qmp_path);
        if incoming {
            args.extend(["-incoming", "defer"].map(str::to_owned));
        }
        let program = self.release.emulator().with_context(|| format!("no {QEMU}"))?;
        let mut process = Process::spawn(scene, "qemu", &program, &args)?;
        let qmp = Qmp::new(accept(&qmp, &mut process)?)?;
        let agent = Agent::new(accept(&agent, &mut process)?)?;
        // The kernel's log may be made later than we look for a fresh name.
        let _ = std::fs::File::options().create(true).append(true).open(&kernel_log);
        Ok(Vm { process, agent, qmp, kernel_log, accel, tolerated: Vec::new(), builder: self })
    }

    fn args(
        &self,
        accel: Accel,
        initramfs: &Path,
        kernel_log: &Path,
        agent: &Path,
        qmp: &Path,
    ) -> Vec<String> {
        let mut args = Vec::new();
        let mut add = |option: &str, value: String| args.extend([format!("-{option}"), value]);
        add("accel", accel.qemu_accel().to_owned());
        add("cpu", accel.qemu_cpu().to_owned());
        add("smp", self.cpus.to_string());
        let kib = (self.memory_mib << 10) + if accel == Accel::Tcg { ODD_KIB } else { 0 };
        add("m", format!("{kib}K,slots=8,maxmem=4G"));
        let memory = if self.nodes == 1 {
            add("object", format!("memory-backend-memfd,id=mem,size={kib}K,share=on"));
            ",memory-backend=mem"
        } else {
            let (kib, cpus) = (kib / u64::from(self.nodes), self.cpus / self.nodes);
            for node in 0..self.nodes {
                add("object", format!("memory-backend-memfd,id=mem{node},size={kib}K,share=on"));
                let (first, last) = (node * cpus, (node + 1) * cpus - 1);
                add("numa", format!("node,nodeid={node},cpus={first}-{last},memdev=mem{node}"));
            }
            ""
        };
        if self.iommu {
            // Before all that is to be behind it.
            let irqchip = if accel == Accel::Kvm { ",kernel-irqchip=split" } else { "" };
            add("machine", format!("q35{memory}{irqchip}"));
            add("device", "intel-iommu,intremap=on,device-iotlb=on".to_owned());
        } else {
            add("machine", format!("pc{memory}"));
        }
        for (n, mib) in self.dimms_mib.iter().enumerate() {
            add("object", format!("memory-backend-memfd,id=boot-mem{n},size={mib}M,share=on"));
            add("device", format!("pc-dimm,id=boot-dimm{n},memdev=boot-mem{n}"));
        }
        add("kernel", self.release.guest("vmlinux").display().to_string());
        add("initrd", initramfs.display().to_string());
        add("append", self.kernel_args.clone());
        add("serial", format!("file:{}", kernel_log.display()));
        add("chardev", format!("socket,id=agent,path={}", agent.display()));
        add("device", "virtio-serial-pci".to_owned());
        add("device", "virtserialport,chardev=agent,nr=1".to_owned());
        add("chardev", format!("socket,id=qmp,path={}", qmp.display()));
        add("mon", "chardev=qmp,mode=control".to_owned());
        for (n, disk) in self.disks.iter().enumerate() {
            let socket = disk.socket.display();
            if let Some(port) = disk.props.get("bus").and_then(Value::as_str) {
                add("device", format!("pcie-root-port,id={port},chassis={}", n + 1));
            }
            add("chardev", format!("socket,id={},path={socket},reconnect=1", disk.chardev()));
            add("device", disk.device(self.packed).to_string());
        }
        for nic in &self.nics {
            add("chardev", nic.chardev_arg());
            add("netdev", nic.netdev().to_string());
            add("device", nic.device(self.packed, accel).to_string());
        }
        args.extend(["-nodefaults", "-display", "none"].map(str::to_owned));
        args.extend(self.args.iter().cloned());
        args
    }
}

/// A running virtual machine. Dropping it kills it.
#[derive(Debug)]
pub struct Vm {
    process: Process,
    agent: Agent,
    qmp: Qmp,
    kernel_log: PathBuf,
    accel: Accel,
    tolerated: Vec<&'static str>,
    /// What another QEMU is started with when the guest migrates.
    builder: VmBuilder,
}

impl Shell for Vm {
    fn run_for(&mut self, command: &str, limit: Duration) -> Result<Output> {
        Vm::run_for(self, command, limit)
    }
}

impl Vm {
    /// Describes a virtual machine: 384 MiB, four CPUs, neither disks nor network cards.
    pub fn builder() -> VmBuilder {
        VmBuilder::default()
    }

    /// Waits for the agent in the guest, which comes up at every boot.
    pub fn wait_ready(&mut self, limit: Duration) -> Result<()> {
        self.agent.wait_ready(limit).map_err(|error| self.explain(&error))
    }

    /// What executes the guest.
    pub fn accel(&self) -> Accel {
        self.accel
    }

    /// [`Shell::run`].
    pub fn run(&mut self, command: &str) -> Result<Output> {
        Shell::run(self, command)
    }

    /// [`Shell::run_for`]; when the command does not end in time, the virtual machine is killed.
    pub fn run_for(&mut self, command: &str, limit: Duration) -> Result<Output> {
        match self.agent.run(command, limit) {
            Ok(output) => Ok(output),
            Err(error) => {
                let error = self.explain(&error);
                self.kill()?;
                Err(error)
            }
        }
    }

    /// [`Shell::check`].
    pub fn check(&mut self, command: &str) -> Result<String> {
        Shell::check(self, command)
    }

    /// [`Shell::check_soon`].
    pub fn check_soon(&mut self, command: &str, limit: Duration) -> Result<()> {
        Shell::check_soon(self, command, limit)
    }

    /// [`Shell::start`].
    pub fn start(&mut self, name: &str, command: &str) -> Result<()> {
        Shell::start(self, name, command)
    }

    /// [`Shell::is_running`].
    pub fn is_running(&mut self, name: &str) -> Result<bool> {
        Shell::is_running(self, name)
    }

    /// [`Shell::join`].
    pub fn join(&mut self, name: &str, limit: Duration) -> Result<Output> {
        Shell::join(self, name, limit)
    }

    /// Sends a complete QMP request and returns what it returns.
    pub fn qmp(&mut self, request: &Value) -> Result<Value> {
        self.qmp.raw(request).with_context(|| format!("QMP {request}"))
    }

    /// Waits for a QMP event by its name; one that has come before counts, once.
    pub fn wait_event(&mut self, name: &str, limit: Duration) -> Result<Value> {
        self.qmp
            .wait_event(limit, |event| event["event"] == name)?
            .with_context(|| format!("no event {name} within {limit:?}"))
    }

    /// Plugs a disk in; it is there when the guest shows one more block device.
    pub fn hotplug_disk(&mut self, disk: &Disk) -> Result<()> {
        let before = self.disk_count()?;
        let address = json!({ "type": "unix", "data": { "path": disk.socket.to_string_lossy() } });
        let backend =
            json!({ "type": "socket", "data": { "addr": address, "server": false, "reconnect": 1 } });
        self.qmp.execute("chardev-add", &json!({ "id": disk.chardev(), "backend": backend }))?;
        self.qmp.execute("device_add", &disk.device(self.builder.packed))?;
        self.wait_disk_count(before + 1)
    }

    /// Unplugs a disk, with the guest's consent, and drops the connection to its back end.
    pub fn unplug_disk(&mut self, disk: &Disk) -> Result<()> {
        self.unplug(&disk.id)?;
        self.qmp.execute("chardev-remove", &json!({ "id": disk.chardev() }))?;
        Ok(())
    }

    /// Plugs a memory module in and waits until the guest uses it.
    pub fn hotplug_memory(&mut self, id: &str, mib: u64) -> Result<()> {
        let before = self.memory_kib()?;
        let object = json!({ "qom-type": "memory-backend-memfd", "id": format!("mem-{id}"),
            "size": mib << 20, "share": true });
        self.qmp.execute("object-add", &object)?;
        self.qmp.execute(
            "device_add",
            &json!({ "driver": "pc-dimm", "id": id, "memdev": format!("mem-{id}") }),
        )?;
        // The guest keeps a little of it for its own tables.
        let want = before + (mib << 10) * 9 / 10;
        wait::until("hot-plugged memory", UNPLUG_LIMIT, || Ok((self.memory_kib()? >= want).then_some(())))
    }

    /// Unplugs a memory module, with the guest's consent. Asks again while the guest finds pages in it that it
    /// cannot move.
    pub fn unplug_memory(&mut self, id: &str) -> Result<()> {
        self.unplug(id)?;
        self.qmp.execute("object-del", &json!({ "id": format!("mem-{id}") }))?;
        Ok(())
    }

    /// The memory the guest has, in KiB.
    pub fn memory_kib(&mut self) -> Result<u64> {
        Ok(self.check("awk '/^MemTotal/ { print $2 }' /proc/meminfo")?.parse()?)
    }

    /// Has the guest reboot and waits for the agent.
    pub fn reboot(&mut self) -> Result<()> {
        self.agent.send("sync; reboot -f")?;
        self.wait_ready(BOOT_LIMIT)
    }

    /// Has [`Vm::quit`] overlook complaints with these words in them, which the scenario is bound to cause.
    pub fn tolerate(&mut self, words: &'static str) {
        self.tolerated.push(words);
    }

    /// Ends QEMU by its own means and checks that neither it nor the guest's kernel has had anything to
    /// complain about.
    pub fn quit(mut self) -> Result<()> {
        self.qmp.execute("quit", &json!({}))?;
        let status = self.process.wait_exit(Duration::from_secs(60))?;
        ensure!(status.success(), "QEMU: {status}\n{}", self.process.stderr_tail());
        self.expect_no_complaints()
    }

    /// Fails if QEMU or the guest's kernel has complained so far.
    fn expect_no_complaints(&self) -> Result<()> {
        self.expect_silence("QEMU", &self.process.stderr(), &["vhost"])?;
        let kernel = std::fs::read(&self.kernel_log)?;
        self.expect_silence("the guest's kernel", &String::from_utf8_lossy(&kernel), &KERNEL_COMPLAINTS)
    }

    fn expect_silence(&self, who: &str, said: &str, bad: &[&str]) -> Result<()> {
        expect_silence(who, said, bad, &self.tolerated)
    }

    /// Kills QEMU with `SIGKILL`.
    pub fn kill(&mut self) -> Result<()> {
        self.process.kill9()
    }

    /// What QEMU has written on standard error.
    pub fn stderr(&self) -> String {
        self.process.stderr()
    }

    fn disk_count(&mut self) -> Result<u64> {
        Ok(self.check("ls /sys/block | wc -l")?.parse()?)
    }

    fn wait_disk_count(&mut self, want: u64) -> Result<()> {
        let what = format!("{want} disks in the guest");
        wait::until(&what, UNPLUG_LIMIT, || Ok((self.disk_count()? == want).then_some(())))
    }

    fn unplug(&mut self, id: &str) -> Result<()> {
        self.qmp.clear_events();
        let deadline = Instant::now() + UNPLUG_LIMIT;
        let mut last_answer = String::new();
        while Instant::now() < deadline {
            // While the first request is pending a further one is an error, and no harm.
            if let Err(error) = self.qmp.execute("device_del", &json!({ "id": id })) {
                last_answer = format!("{error:#}");
            }
            let is_gone = |event: &Value| event["event"] == "DEVICE_DELETED" && event["data"]["device"] == id;
            if self.qmp.wait_event(Duration::from_secs(4), is_gone)?.is_some() {
                return Ok(());
            }
        }
        Err(self.explain(&anyhow!("the guest does not let go of {id}; {last_answer}")))
    }

    /// The error, which comes first for those who see no more than the beginning, and what there was to be heard.
    fn explain(&mut self, error: &anyhow::Error) -> anyhow::Error {
        let said = self.process.stderr_tail();
        let end = self.process.poll_exit().ok().flatten().map(|status| format!(" before its end ({status})"));
        let end = end.unwrap_or_default();
        let (cpus, kernel) = (self.processors(), tail(&self.kernel_log, 30));
        anyhow!(
            "{error:#}\nthe guest's processors:\n{cpus}\nQEMU says{end}:\n{said}\nthe guest's kernel says:\n{kernel}"
        )
    }

    /// Where the guest's processors are, and whether they wait for an interrupt.
    fn processors(&mut self) -> String {
        match self.qmp.execute("human-monitor-command", &json!({ "command-line": "info registers -a" })) {
            Ok(said) => {
                let lines = said.as_str().unwrap_or_default().lines();
                lines.filter(|line| line.starts_with("RIP=")).collect::<Vec<_>>().join("\n")
            }
            Err(error) => format!("{error:#}"),
        }
    }
}

/// Fails if a line of what somebody has said has bad words in it, and none that are tolerated.
pub fn expect_silence(who: &str, said: &str, bad: &[&str], tolerated: &[&str]) -> Result<()> {
    let is_any = |line: &str, words: &[&str]| words.iter().any(|&word| line.contains(word));
    match said.lines().find(|line| is_any(line, bad) && !is_any(line, tolerated)) {
        Some(line) => bail!("{who} says: {line}"),
        None => Ok(()),
    }
}

/// The connection that QEMU makes when it starts.
pub(crate) fn accept(
    listener: &UnixListener,
    process: &mut Process,
) -> Result<std::os::unix::net::UnixStream> {
    wait::until("connection from QEMU", Duration::from_secs(60), || {
        if let Ok((stream, _)) = listener.accept() {
            return Ok(Some(stream));
        }
        if let Some(status) = process.poll_exit()? {
            bail!("QEMU has ended at once ({status}): {}", process.stderr_tail());
        }
        Ok(None)
    })
}
