package node

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"

	"github.com/mantlet/mantlet/agent"
)

// PluginName is the plugin's type in CNI configurations, and the name of its binary.
const PluginName = "mantlet-cni"

// pluginConf is the plugin's entry in a CNI configuration list.
type pluginConf struct {
	types.NetConf
	KubeletRoot string `json:"kubeletRoot"` // the kubelet's --root-dir
	StateDir    string `json:"stateDir"`    // where State files go
}

// Plugin is the process that a container runtime starts, by the CNI specification (1.1.0 and those before it from 0.3.1): it answers on stdout and
// ends the process. It is the last of a chain and passes on the result of those before it.
func Plugin() {
	skel.PluginMainFuncs(skel.CNIFuncs{Add: add, Del: del, Check: check, GC: collect, Status: func(*skel.CmdArgs) error { return nil }},
		version.PluginSupports("0.3.1", "0.4.0", "1.0.0", "1.1.0"), "mantlet: closes pods that have a sidecar until the sidecar enforces")
}

func readConf(stdin []byte) (c pluginConf, err error) {
	if err := json.Unmarshal(stdin, &c); err != nil {
		return c, fmt.Errorf("%s: configuration: %w", PluginName, err)
	}
	if c.KubeletRoot == "" || c.StateDir == "" {
		return c, fmt.Errorf("%s: configuration: kubeletRoot and stateDir must be set (mantlet-agent node writes them)", PluginName)
	}
	return c, nil
}

// add closes the pod, if it has a sidecar.
func add(args *skel.CmdArgs) error {
	c, err := readConf(args.StdinData)
	if err != nil {
		return err
	}
	if err := version.ParsePrevResult(&c.NetConf); err != nil {
		return err
	}
	if c.PrevResult == nil {
		return fmt.Errorf("%s: it must come after the plugin that makes the pod's interface, in one configuration list", PluginName)
	}
	state, enforced, err := podOf(args, c.KubeletRoot)
	if err != nil {
		return fmt.Errorf("%s: whether the pod has a sidecar cannot be told, so it does not start: %w", PluginName, err)
	}
	if enforced {
		if err := state.write(c.StateDir); err != nil {
			return fmt.Errorf("%s: %w", PluginName, err)
		}
		if err := inside(args.Netns, func() error { return agent.Shut(slog.New(slog.DiscardHandler)) }); err != nil {
			return fmt.Errorf("%s: the pod cannot be closed, so it does not start: %w", PluginName, err)
		}
	}
	return types.PrintResult(c.PrevResult, c.CNIVersion)
}

// del forgets the pod, also one that is not known.
func del(args *skel.CmdArgs) error {
	c, err := readConf(args.StdinData)
	if err != nil {
		return err
	}
	return removeState(c.StateDir, args.ContainerID)
}

// check fails where a pod with a sidecar is not known.
func check(args *skel.CmdArgs) error {
	c, err := readConf(args.StdinData)
	if err != nil {
		return err
	}
	_, enforced, err := podOf(args, c.KubeletRoot)
	if err != nil || !enforced {
		return err
	}
	_, err = readState(statePath(c.StateDir, args.ContainerID))
	return err
}

// collect forgets pods that the runtime does not know any more.
func collect(args *skel.CmdArgs) error {
	c, err := readConf(args.StdinData)
	if err != nil {
		return err
	}
	states, err := readStates(c.StateDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	for _, s := range states {
		if !slices.ContainsFunc(c.ValidAttachments, func(a types.GCAttachment) bool { return a.ContainerID == s.ContainerID }) {
			err = errors.Join(err, removeState(c.StateDir, s.ContainerID))
		}
	}
	return err
}

// podOf tells whose sandbox it is, and whether the pod has a sidecar that leaves the kernel to the node.
func podOf(args *skel.CmdArgs, kubeletRoot string) (s State, enforced bool, err error) {
	words := map[string]string{}
	for _, word := range strings.Split(args.Args, ";") {
		key, value, _ := strings.Cut(word, "=")
		words[key] = value
	}
	s = State{ContainerID: args.ContainerID, Netns: args.Netns, Namespace: words["K8S_POD_NAMESPACE"], Name: words["K8S_POD_NAME"], UID: words["K8S_POD_UID"]}
	if s.Namespace == "" && s.Name == "" && s.UID == "" {
		return s, false, nil // a container of somebody else's, not of the kubelet
	}
	if s.UID == "" {
		return s, false, errors.New("the container runtime does not say K8S_POD_UID (containerd 1.5.9 and CRI-O 1.22 do): update it")
	}
	if !word.MatchString(s.UID) {
		return s, false, fmt.Errorf("K8S_POD_UID %q is none", s.UID)
	}
	switch _, err := os.Lstat(VolumePath(kubeletRoot, s.UID)); {
	case err == nil:
		return s, true, nil
	case !errors.Is(err, fs.ErrNotExist):
		return s, false, err
	}
	// No volume counts only where the kubelet keeps the pod's volumes here.
	if _, err := os.Lstat(podPath(kubeletRoot, s.UID)); err != nil {
		return s, false, fmt.Errorf("the kubelet's folder of the pod (is %s the kubelet's --root-dir? see mantlet-agent node --kubelet-root): %w", kubeletRoot, err)
	}
	return s, false, nil
}
