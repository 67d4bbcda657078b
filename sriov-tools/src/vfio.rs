//! Who holds VFIO groups and devices, and who keeps network namespaces: found among the descriptors of all processes.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::host::Process;
use crate::sysfs;

/// A process, by its directory below /proc.
fn process(pid: u32, proc: &Path) -> Process {
    let command = fs::read_to_string(proc.join(pid.to_string()).join("comm")).unwrap_or_default();
    Process { pid, command: command.trim().to_owned() }
}

fn pids(proc: &Path) -> impl Iterator<Item = u32> {
    sysfs::names(proc).into_iter().filter_map(|name| name.parse().ok())
}

/// Who has which group open, or a device of it, by its number.
pub fn holders(proc: &Path, sys: &Path) -> BTreeMap<u32, Vec<Process>> {
    let mut holders: BTreeMap<u32, Vec<Process>> = BTreeMap::new();
    for pid in pids(proc) {
        let fds = proc.join(pid.to_string()).join("fd");
        let mut groups: Vec<u32> = sysfs::names(&fds)
            .iter()
            .filter_map(|fd| group(&fs::read_link(fds.join(fd)).ok()?, sys))
            .collect();
        groups.sort_unstable();
        groups.dedup();
        for group in groups {
            holders.entry(group).or_default().push(process(pid, proc));
        }
    }
    holders
}

/// The group that a descriptor is of: `/dev/vfio/NUMBER`, or `noiommu-NUMBER` without an IOMMU. That of a single device,
/// as programs open it that use iommufd, is `/dev/vfio/devices/vfioNUMBER` (drivers/vfio/device_cdev.c).
fn group(target: &Path, sys: &Path) -> Option<u32> {
    let name = target.strip_prefix("/dev/vfio").ok()?.to_str()?;
    if let Some(device) = name.strip_prefix("devices/") {
        let device = sys.join("class/vfio-dev").join(device).join("device");
        return sysfs::link_name(&device.join("iommu_group"))?.parse().ok();
    }
    name.strip_prefix("noiommu-").unwrap_or(name).parse().ok()
}

/// Network namespaces other than ours: a path to each, and a process in it.
pub fn namespaces(proc: &Path, named: &Path) -> Vec<(PathBuf, Option<Process>)> {
    use std::os::unix::fs::MetadataExt;
    let identity = |path: &Path| fs::metadata(path).ok().map(|meta| (meta.dev(), meta.ino()));
    let Some(ours) = identity(&proc.join("self/ns/net")) else { return Vec::new() };
    let mut found: BTreeMap<(u64, u64), (PathBuf, Option<Process>)> = BTreeMap::new();
    for name in sysfs::names(named) {
        let path = named.join(name);
        if let Some(id) = identity(&path) {
            found.insert(id, (path, None));
        }
    }
    for pid in pids(proc) {
        let dir = proc.join(pid.to_string());
        let inside = dir.join("ns/net");
        if let Some(id) = identity(&inside) {
            found.entry(id).or_insert_with(|| (inside, None)).1.get_or_insert_with(|| process(pid, proc));
        }
        // One that only a descriptor keeps.
        for fd in sysfs::names(&dir.join("fd")) {
            let fd = dir.join("fd").join(fd);
            if fs::read_link(&fd).is_ok_and(|target| target.to_string_lossy().starts_with("net:["))
                && let Some(id) = identity(&fd)
            {
                found.entry(id).or_insert_with(|| (fd, Some(process(pid, proc))));
            }
        }
    }
    found.remove(&ours);
    // What lies in /run/netns is on a file system of namespaces; an empty file there is none.
    found.into_iter().filter(|((dev, _), _)| *dev == ours.0).map(|(_, found)| found).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn groups_are_found_among_descriptors() {
        let dir = tempfile::tempdir().unwrap();
        for (pid, comm, targets) in [
            (17, "qemu-system-x86", &["/dev/vfio/vfio", "/dev/vfio/5", "anon_inode:[vfio-device]"][..]),
            (18, "other", &["/dev/null", "/dev/vfio/noiommu-7", "/dev/vfio/5"][..]),
        ] {
            let fds = dir.path().join(format!("{pid}/fd"));
            fs::create_dir_all(&fds).unwrap();
            fs::write(dir.path().join(format!("{pid}/comm")), format!("{comm}\n")).unwrap();
            for (n, target) in targets.iter().enumerate() {
                symlink(target, fds.join(n.to_string())).unwrap();
            }
        }
        // Of one device, by its own node.
        let (sys, fds) = (dir.path().join("sys"), dir.path().join("19/fd"));
        let device = sys.join("devices/pci0000:00/0000:01:10.0");
        fs::create_dir_all(device.join("vfio-dev/vfio3")).unwrap();
        fs::create_dir_all(sys.join("class/vfio-dev")).unwrap();
        symlink("../../../../kernel/iommu_groups/9", device.join("iommu_group")).unwrap();
        symlink("../..", device.join("vfio-dev/vfio3/device")).unwrap();
        symlink(device.join("vfio-dev/vfio3"), sys.join("class/vfio-dev/vfio3")).unwrap();
        fs::create_dir_all(&fds).unwrap();
        for (n, target) in
            ["/dev/iommu", "/dev/vfio/devices/vfio3", "/dev/vfio/devices/vfio4"].iter().enumerate()
        {
            symlink(target, fds.join(n.to_string())).unwrap();
        }
        let holders = holders(dir.path(), &sys);
        assert_eq!(holders[&5].iter().map(|p| p.pid).collect::<Vec<_>>(), [17, 18]);
        assert_eq!(holders[&5][0].to_string(), "17 (qemu-system-x86)");
        assert_eq!(holders[&7].len(), 1);
        assert_eq!(holders[&9].iter().map(|p| p.pid).collect::<Vec<_>>(), [19]);
        assert_eq!(holders.len(), 3);
    }

    #[test]
    fn our_own_namespace_is_not_among_the_others() {
        let here = fs::read_link("/proc/self/ns/net").unwrap();
        for (path, _) in namespaces(Path::new("/proc"), Path::new("/run/netns")) {
            assert_ne!(fs::read_link(&path).ok(), Some(here.clone()), "{}", path.display());
        }
    }
}
