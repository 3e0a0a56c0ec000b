package org.fleetune.demo;

import android.app.job.JobInfo;
import android.app.job.JobParameters;
import android.app.job.JobScheduler;
import android.app.job.JobService;
import android.content.ComponentName;
import android.content.Context;

/** Trains while the phone charges on a network without a meter; the system says when, and when to stop. */
public final class ChargingJob extends JobService {
    private static final int ID = 1;
    private static final long EVERY_MS = 60 * 60 * 1000L;

    /** Ask the system to start it; it stays asked for over restarts of the phone. */
    static void plan(Context context) {
        JobInfo asked = new JobInfo.Builder(ID, new ComponentName(context, ChargingJob.class))
                .setRequiresCharging(true)
                .setRequiredNetworkType(JobInfo.NETWORK_TYPE_UNMETERED)
                .setPeriodic(EVERY_MS)
                .setPersisted(true)
                .build();
        scheduler(context).schedule(asked);
    }

    /** Ask for it no more. */
    static void cancel(Context context) {
        scheduler(context).cancel(ID);
    }

    /** Whether it is asked for. */
    static boolean isPlanned(Context context) {
        for (JobInfo job : scheduler(context).getAllPendingJobs()) {
            if (job.getId() == ID) {
                return true;
            }
        }
        return false;
    }

    @Override
    public boolean onStartJob(JobParameters parameters) {
        TrainingService.start(this, true);
        return true; // until the system stops it: the charger is pulled, the network is another
    }

    @Override
    public boolean onStopJob(JobParameters parameters) {
        TrainingService.stop(this);
        return true; // again when it may
    }

    private static JobScheduler scheduler(Context context) {
        return (JobScheduler) context.getSystemService(Context.JOB_SCHEDULER_SERVICE);
    }
}
