package agent

import (
	"bytes"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mantlet/mantlet/agent/podtest"
	"github.com/mantlet/mantlet/xds/proxyuser"
)

// nodeWorld is a world whose agent is a process without privileges, as another user than the test's, with a node around it: the kubelet's
// folder of the pod, the CNI plugin's binary, and a daemon in a network namespace that is not the pod's.
type nodeWorld struct {
	*world
	dir    string
	binary string         // mantlet-agent
	volume string         // the pod's, as the kubelet has it
	netns  string         // path of the pod's
	user   proxyuser.User // the pod's sidecar's, as its spec says
	agent  *process
	daemon *process
}

// built is mantlet-agent, built once.
var built = sync.OnceValues(func() ([]byte, error) {
	dir, err := os.MkdirTemp("", "agent")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	cmd := exec.Command("go", "build", "-o", dir, "github.com/mantlet/mantlet/cmd/mantlet-agent")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("%w\n%s", err, out)
	}
	return os.ReadFile(filepath.Join(dir, "mantlet-agent"))
})

func newNodeWorld(t *testing.T) *nodeWorld {
	t.Helper()
	if podtest.SingleUser() {
		t.Skip("node mode takes a user of its own for the sidecar, and this user namespace maps one user only: run the tests as root")
	}
	w := &nodeWorld{world: newWorld(t), dir: podtest.Dir(t), user: proxyuser.Pod.User(randomSeed())}
	w.binary = filepath.Join(w.dir, "mantlet-agent")
	text, err := built()
	if err != nil {
		t.Fatalf("build mantlet-agent: %v", err)
	}
	netns, err := os.Open("/proc/thread-self/ns/net") // the process's may be that of a thread that went outside
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { netns.Close() })
	w.netns = fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), netns.Fd())
	w.volume = filepath.Join(w.dir, "k", "pods", "uid-db", "volumes", "kubernetes.io~empty-dir", "mantlet-run")
	w.cfg.RunDir = filepath.Join(w.volume, "agent")
	var roots bytes.Buffer
	for _, c := range w.ca.Bundle().X509Authorities() {
		if err := pem.Encode(&roots, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}); err != nil {
			t.Fatal(err)
		}
	}
	token, err := w.cfg.Token()
	if err != nil {
		t.Fatal(err)
	}
	for path, b := range map[string][]byte{w.binary: text, w.file("ca.crt"): roots.Bytes(), w.file("token"): []byte(token)} {
		if err := os.WriteFile(path, b, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.MkdirAll(w.volume, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(w.volume, 0o777); err != nil { // as the kubelet has it
		t.Fatal(err)
	}
	if err := os.Link(w.binary, w.file("mantlet-cni")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cleanRedirect(t) })
	return w
}

func (w *nodeWorld) file(name string) string { return filepath.Join(w.dir, name) }

// cni runs the plugin as a container runtime does.
func (w *nodeWorld) cni(command string) (out string, err error) {
	conf, err := json.Marshal(map[string]any{"cniVersion": "1.0.0", "name": "pods", "type": "mantlet-cni", "kubeletRoot": w.file("k"), "stateDir": w.file("state"),
		"prevResult": map[string]any{"cniVersion": "1.0.0", "ips": []any{map[string]any{"address": "10.99.0.2/24"}}}})
	if err != nil {
		return "", err
	}
	cmd := exec.Command(w.file("mantlet-cni"))
	cmd.Env = []string{"CNI_COMMAND=" + command, "CNI_CONTAINERID=c1", "CNI_NETNS=" + w.netns, "CNI_IFNAME=eth0", "CNI_PATH=/none",
		"CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=db;K8S_POD_INFRA_CONTAINER_ID=c1;K8S_POD_UID=uid-db"}
	cmd.Stdin = bytes.NewReader(conf)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	// Container runtimes are not in the pod.
	var b []byte
	w.outside.Do(func() { b, err = cmd.Output() })
	if err != nil {
		err = fmt.Errorf("%w: %s%s", err, b, stderr.Bytes())
	}
	return string(b), err
}

// process is one that a test has started.
type process struct {
	cmd  *exec.Cmd
	done chan struct{}
}

// start starts a process that ends with the test, from a thread that in runs something on and ends.
func start(t *testing.T, cmd *exec.Cmd, in func(func())) *process {
	t.Helper()
	p := &process{cmd: cmd, done: make(chan struct{})}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Credential: cmd.SysProcAttr.Credential}
	started := make(chan error)
	go func() {
		defer close(p.done)
		in(func() {
			err := cmd.Start()
			started <- err
			if err == nil {
				_ = cmd.Wait()
			}
		})
	}()
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.stop(t, unix.SIGTERM) })
	return p
}

func (p *process) stop(t *testing.T, signal syscall.Signal) {
	t.Helper()
	_ = p.cmd.Process.Signal(signal)
	select {
	case <-p.done:
	case <-time.After(patience):
		_ = p.cmd.Process.Kill()
		t.Errorf("%s does not end", p.cmd)
	}
}

// startAgent starts the pod's agent, as user and with the privileges of a restricted pod.
func (w *nodeWorld) startAgent() {
	w.t.Helper()
	before, _ := w.log.read()
	w.launchAgent()
	w.log.await(w.t, "start of envoy", func(s string) bool { return strings.Contains(s[len(before):], "envoy: started") })
}

// launchAgent does not wait for what becomes of it.
func (w *nodeWorld) launchAgent() {
	w.t.Helper()
	cmd := exec.Command(w.binary, "run", "--pod", w.cfg.Pod, "--control-plane", w.cfg.ControlPlane, "--trust-domain", "td.example",
		"--bundle", w.file("ca.crt"), "--token-file", w.file("token"), "--envoy", w.cfg.Envoy, "--run-dir", w.cfg.RunDir, "--capture", "node",
		"--verbose", "--drain-timeout", "1s")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: w.user.UID, Gid: w.user.GID}}
	cmd.Stdout, cmd.Stderr = w.flows, w.log
	w.agent = start(w.t, cmd, func(f func()) {
		podtest.OnThread(func() {
			for c := uintptr(0); unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0) == nil; c++ { // capabilities: drop: [ALL]
			}
			if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil { // allowPrivilegeEscalation: false
				panic(err)
			}
			f()
		})
	})
}

// startDaemon starts the node's daemon.
func (w *nodeWorld) startDaemon() {
	w.t.Helper()
	cmd := exec.Command(w.binary, "node", "--state-dir", w.file("state"), "--kubelet-root", w.file("k"),
		"--cni-bin-dir", w.file("bin"), "--cni-conf-dir", w.file("net.d"))
	for _, d := range []string{"bin", "net.d"} {
		if err := os.MkdirAll(w.file(d), 0o755); err != nil {
			w.t.Fatal(err)
		}
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{}
	cmd.Stdout, cmd.Stderr = w.log, w.log
	w.daemon = start(w.t, cmd, w.outside.Do)
}

// ready waits until the agent says that the pod is enforced.
func (w *nodeWorld) ready() {
	w.t.Helper()
	if err := Ready(w.t.Context(), w.cfg.RunDir, patience); err != nil {
		w.t.Fatal(err)
	}
}

// children are the processes that work in pods for the daemon.
func (w *nodeWorld) children() (list []int) {
	w.t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		w.t.Fatal(err)
	}
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil || !bytes.HasPrefix(text, []byte(w.binary+"\x00netns\x00")) {
			continue
		}
		var pid int
		if _, err := fmt.Sscanf(f, "/proc/%d/", &pid); err == nil {
			list = append(list, pid)
		}
	}
	return list
}

// inControlGroup puts a process into a control group of its own, in whatever hierarchy there is, until it ends.
func inControlGroup(t *testing.T, name string, p *process) {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		f := strings.Fields(line)
		if len(f) < 3 || !strings.HasPrefix(f[2], "cgroup") || strings.Contains(line, "cpuset") { // which takes more to set up
			continue
		}
		dir := filepath.Join(f[1], name)
		if err = os.Mkdir(dir, 0o755); err != nil {
			continue
		}
		if err = os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(fmt.Sprint(p.cmd.Process.Pid)), 0o600); err != nil {
			_ = os.Remove(dir)
			continue
		}
		t.Cleanup(func() {
			p.stop(t, unix.SIGKILL)
			eventually(t, "the control group is empty", func() bool { return os.Remove(dir) == nil })
		})
		return
	}
	t.Fatalf("no control group can be made: %v", err)
}
