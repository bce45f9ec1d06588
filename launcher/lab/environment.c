/* Stands in for a container engine's Slurm plug-in (CSCS: srun --environment=EDF): takes the option, and leaves its
 * value in every task's environment as LAB_ENVIRONMENT. It starts no container. */
#include <slurm/spank.h>
#include <stdio.h>

SPANK_PLUGIN(environment, 1)

static char description[4096];

static int keep(int value, const char *argument, int remote) {
    (void)value;
    (void)remote;
    if (argument == NULL || argument[0] == '\0')
        return ESPANK_BAD_ARG;
    snprintf(description, sizeof description, "%s", argument);
    return ESPANK_SUCCESS;
}

static struct spank_option option = {
    "environment", "EDF", "run the tasks in the container that EDF describes", 1, 0, (spank_opt_cb_f)keep};

int slurm_spank_init(spank_t spank, int argc, char **argv) {
    (void)argc;
    (void)argv;
    return spank_option_register(spank, &option);
}

int slurm_spank_task_init(spank_t spank, int argc, char **argv) {
    (void)argc;
    (void)argv;
    if (description[0] != '\0')
        spank_setenv(spank, "LAB_ENVIRONMENT", description, 1);
    return ESPANK_SUCCESS;
}
